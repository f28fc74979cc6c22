"""Names, transforms, seeds, image sizes, a user's own module: what `load_backbone` takes and how it
says no.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision import models, transforms

from embedpipe.backbones import describe_layers, list_models, load_backbone, refresh
from embedpipe.errors import UsageError, WeightsUnavailable
from embedpipe.images import Transform
from embedpipe.provenance import fingerprint

PHOTO = Image.effect_mandelbrot((317, 241), (-2, -1.5, 1, 1.5), 100).convert("RGB")
SMALL = Transform(crop_size=(32, 32), resize_size=32)


def test_list_models() -> None:
    names = list_models()
    assert len([n for n in names if n.startswith("timm:")]) == len(timm.list_models())
    assert "torchvision:resnet18" in names
    assert not [n for n in names if "fasterrcnn" in n or "deeplab" in n]
    assert list_models("resnet18") == [n for n in names if "resnet18" in n]
    assert set(list_models("resnet1?")) == {"timm:resnet18", "torchvision:resnet18"}


def test_unknown_model_names_the_nearest_of_both_libraries() -> None:
    with pytest.raises(UsageError, match="timm:resnet18 or torchvision:resnet18"):
        load_backbone("resnet_18", weights="none")
    with pytest.raises(UsageError, match=r"no model 'timm:resnet18\.nosuch'"):
        load_backbone("timm:resnet18.nosuch", weights="none")
    with pytest.raises(UsageError, match="no model 'keras:resnet18'"):
        load_backbone("keras:resnet18", weights="none")


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "resnet18.tv_in1k"])
def test_transform_is_timms(name: str) -> None:
    backbone = load_backbone(name, weights="none")
    cfg = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert torch.equal(backbone.transform(PHOTO), create_transform(**cfg)(PHOTO))


def test_transform_overrides_are_timms() -> None:
    backbone = load_backbone("test_resnet", weights="none", image_size=96, crop_pct=0.8, interpolation="bilinear")
    asked = {"img_size": 96, "crop_pct": 0.8, "interpolation": "bilinear"}
    cfg = resolve_data_config(asked, pretrained_cfg=timm.get_pretrained_cfg("test_resnet").to_dict())
    assert torch.equal(backbone.transform(PHOTO), create_transform(**cfg)(PHOTO))
    assert backbone.image_size == (96, 96)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_transform_is_torchvisions(name: str) -> None:
    backbone = load_backbone(f"torchvision:{name}", weights="none")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert torch.equal(backbone.transform(PHOTO), preset(PHOTO))


def test_lite0_takes_mean_and_std_of_one_half() -> None:
    transform = load_backbone("tf_efficientnet_lite0", weights="none").transform
    assert transform.mean == transform.std == (0.5, 0.5, 0.5)


def test_seed_makes_random_weights_reproducible_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (load_backbone("test_resnet", weights="none", seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.spec == again.spec
    assert first.spec["weights"] != other.spec["weights"]
    assert first.origin == "none: seed 1"


def test_spec_changes_with_all_that_shapes_a_feature() -> None:
    load = lambda **kwargs: load_backbone("test_vit", weights="none", **kwargs)  # noqa: E731
    variants = [
        load(),
        load(seed=1),
        load(layer="blocks.0"),
        load(layer="blocks.0", pool="cls"),
        load(crop_pct=0.5),
        load(interpolation="bilinear"),
        load(image_size=128),
    ]
    assert len({fingerprint(b.spec) for b in variants}) == len(variants)
    assert fingerprint(load(layer="blocks.0", pool="avg").spec) == fingerprint(load(layer="blocks.0").spec)


def test_frozen_and_in_eval_mode() -> None:
    module = load_backbone("test_resnet", weights="none").module
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(m.training for m in module.modules())


def test_state_dict_has_the_librarys_names() -> None:
    own = load_backbone("test_resnet", weights="none").module.model.state_dict()
    assert set(timm.create_model("test_resnet").state_dict()) - set(own) == {"fc.weight", "fc.bias"}


def test_image_size_reaches_a_model_of_fixed_size_and_refusals_say_so() -> None:
    backbone = load_backbone("test_vit", weights="none", image_size=96)
    assert backbone.module(torch.zeros(1, 3, 96, 96)).shape == (1, backbone.feature_dim)
    with pytest.raises(UsageError, match="torchvision:vit_b_16 refuses images of 96 x 96"):
        load_backbone("torchvision:vit_b_16", weights="none", image_size=96)


def test_bad_interpolation() -> None:
    with pytest.raises(UsageError, match="bicubic"):
        load_backbone("test_resnet", weights="none", interpolation="cubical")


def test_no_network_says_so_in_one_line_and_at_once(tmp_path) -> None:
    code = (
        "import time, embedpipe.backbones as b, embedpipe.errors as e\n"
        "start = time.monotonic()\n"
        "for name in ('timm:test_resnet', 'torchvision:squeezenet1_1'):\n"
        "    try: b.load_backbone(name)\n"
        "    except e.WeightsUnavailable as exc: print(exc)\n"
        "print('quick' if time.monotonic() - start < 20 else 'slow')\n"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    homes = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | nowhere | homes
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    timm_line, torchvision_line, pace = done.stdout.splitlines()
    assert timm_line.startswith("no network and no stored weights for timm:test_resnet; use --weights packaged")
    assert torchvision_line.startswith("no network and no stored weights for torchvision:squeezenet1_1")
    assert pace == "quick"


def test_a_model_that_timm_has_no_weights_for() -> None:
    name = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(WeightsUnavailable, match="publishes no pretrained weights"):
        load_backbone(name)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 8, 3))

    def forward(self, images):
        return {"map": self.tail(self.stem(images))}


def test_own_module() -> None:
    own = Own()
    backbone = load_backbone(own, transform=SMALL)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(backbone.module(images), own(images)["map"].mean((2, 3)))
    assert (backbone.feature_dim, backbone.image_size) == (8, (32, 32))
    assert [layer.name for layer in backbone.layers] == ["stem", "tail.1"]
    stem = load_backbone(own, transform=SMALL, layer="stem", pool="max")
    assert torch.allclose(stem.module(images), own.stem(images).amax((2, 3)))


def test_own_module_with_a_torchvision_transform() -> None:
    plain = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    assert "Resize" in load_backbone(Own(), transform=plain).spec["transform"]


def test_own_module_needs_a_transform_that_can_be_told_from_another() -> None:
    with pytest.raises(UsageError, match="without a transform"):
        load_backbone(Own())
    with pytest.raises(UsageError, match="does not describe itself"):
        load_backbone(Own(), transform=lambda image: image)


def test_describe_layers_builds_no_weights_and_agrees_with_the_backbone() -> None:
    for name in ("timm:test_resnet", "timm:test_vit", "torchvision:regnet_y_400mf"):
        assert describe_layers(name) == load_backbone(name, weights="none").layers
    big = describe_layers("torchvision:vit_h_14")
    assert [layer.name for layer in big[1:3]] == ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]


def test_layers_are_stages_in_order_of_execution() -> None:
    layers = load_backbone("timm:resnet18", weights="none", image_size=64).layers
    assert [layer.name for layer in layers] == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert layers[-1].shape == (512, 2, 2)
    assert layers[-1].parameters == 8_393_728
    layers = load_backbone("tf_efficientnet_lite0", weights="none").layers
    assert [layer.name for layer in layers] == ["conv_stem", *(f"blocks.{n}" for n in range(7)), "conv_head"]


@pytest.mark.parametrize("kwargs", [{}, {"layer": "blocks.1"}])
def test_copies_and_pickles_catch_their_own_outputs(kwargs) -> None:
    module = load_backbone("test_vit", weights="none", **kwargs).module
    images = torch.randn(1, 3, 160, 160)
    expected = module(images)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0)
            assert torch.equal(twin(images), expected)
            next(iter(twin.parameters())).add_(1)
            assert not torch.equal(twin(images), expected)
        assert torch.equal(module(images), expected)


def test_threads_share_a_tapped_module() -> None:
    module = load_backbone("test_vit", weights="none", layer="blocks.2").module
    batches = [torch.full((1, 3, 160, 160), float(n)) for n in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(module, batches * 4))
        alone = [module(batch) for batch in batches] * 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(threaded, alone, strict=True))


def test_refresh_sees_changed_weights_and_freezes_again() -> None:
    backbone = load_backbone("test_resnet", weights="none")
    assert refresh(backbone, "tuned").spec == backbone.spec
    with torch.no_grad():
        next(iter(backbone.module.parameters())).add_(1)
    backbone.module.train().requires_grad_(True)
    tuned = refresh(backbone, "tuned")
    assert tuned.origin == "tuned"
    assert tuned.spec["weights"] != backbone.spec["weights"]
    assert not tuned.module.model.fc.training
    assert not any(p.requires_grad for p in tuned.module.parameters())

"""What is exported gives the classifier's logits in a process that knows no embedpipe."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import embedpipe as ep
from embedpipe.classifier import Classifier, Reference
from embedpipe.commands.export._formats import FORMATS, check_logits, library_errors, write_model
from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.heads import LinearHead
from embedpipe.heads.knn import fit_knn
from embedpipe.inference import space_spec
from tests.conftest import TINY, Run, write_photos

STRANGER = """
import json, sys
from pathlib import Path
import numpy as np, torch
here = Path(sys.argv[1])
images = torch.from_numpy(np.load(here / "images.npy"))
given = {}
if (here / "torch").is_dir():
    given["torch"] = torch.export.load(here / "torch/model.pt2").module()
    assert "timm" not in sys.modules
if (here / "onnx").is_dir():
    import onnxruntime
    session = onnxruntime.InferenceSession(here / "onnx/model.onnx")
    given["onnx"] = lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
if (here / "timm").is_dir():
    config = json.loads((here / "timm/config.json").read_text())
    if "pretrained_cfg" in config:
        import timm
        given["timm"] = timm.create_model(f"local-dir:{here / 'timm'}", pretrained=True).eval()
    else:
        from safetensors.torch import load_file
        from torchvision import models
        n, options = config["num_classes"], config["model_args"]
        given["timm"] = models.get_model(config["architecture"], num_classes=n, **options).eval()
        given["timm"].load_state_dict(load_file(here / "timm/model.safetensors"))
assert "embedpipe" not in sys.modules
with torch.no_grad():
    np.savez(here / "given.npz", **{f"{k}-{n}": f(images[:n]).numpy() for k, f in given.items() for n in (1, 5)})
"""


def fitted(backbone: str, weights: str = "none") -> Classifier:
    write_photos(Path("photos"))
    return ep.fit_head(ep.extract("photos", backbone, weights=weights), l2=0.1)


def pixels_of(classifier: Classifier) -> torch.Tensor:
    files = sorted(Path("photos").rglob("*.png"))[::8]
    with_transform = [classifier.backbone.transform(Image.open(file).convert("RGB")) for file in files]
    return torch.stack(with_transform)


def check_as_a_stranger(classifier: Classifier, formats: tuple[str, ...], images: torch.Tensor) -> None:
    """Open what was exported in a fresh process, and compare the logits of 1 and 5 images."""
    np.save("images.npy", images.numpy())
    subprocess.run([sys.executable, "-W", "ignore", "-c", STRANGER, str(Path.cwd())], check=True)
    features = np.hstack([one.module(images).numpy() for one in classifier.backbones])
    own = classifier.head.logits(features)  # type: ignore[union-attr]
    given = np.load("given.npz")
    assert set(given) == {f"{name}-{n}" for name in formats for n in (1, 5)}
    for name, logits in given.items():
        n = int(name[-1])
        assert logits.shape == (n, 3)
        np.testing.assert_allclose(logits, own[:n], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("backbone", "weights", "formats"),
    [
        ("timm:test_vit", "none", ("timm", "torch", "onnx")),
        pytest.param("torchvision:squeezenet1_1", "none", ("torch", "onnx"), marks=pytest.mark.slow),
        pytest.param("torchvision:mobilenet_v3_small", "none", ("timm", "torch", "onnx"), marks=pytest.mark.slow),
        ("timm:tf_efficientnet_lite0", "packaged", ("timm",)),
        pytest.param("timm:tf_efficientnet_lite0", "packaged", ("onnx",), marks=pytest.mark.slow),
    ],
)
def test_a_stranger_gets_the_same_logits(backbone: str, weights: str, formats: tuple[Any, ...]) -> None:
    classifier = fitted(backbone, weights)
    for one in formats:
        done = ep.export(classifier, format=one, output=one)
        assert (done.checked_on, done.images) == ("dataset", 8)
        assert done.max_abs_diff < 1e-3
        assert done.files == tuple(sorted(path.name for path in Path(one).iterdir()))
        assert json.loads(Path(one, "labels.json").read_text()) == ["blue", "green", "red"]
    check_as_a_stranger(classifier, formats, pixels_of(classifier))


def test_a_finetuned_run_through_the_command_line(run: Run, photos: Path, tmp_path: Path) -> None:
    run("extract", photos, *TINY)
    run("fit-head", "--l2", 0.1)
    tuned = run("finetune", "--unfreeze", "layer4", "--epochs", 1, "--lr", 0.01, "--json").data["run"]
    for one in ("timm", "torch", "onnx"):
        done = run("export", tuned, "--format", one, "--output", tmp_path / one, "--json").data
        assert set(done) == {"format", "folder", "files", "max_abs_diff", "checked_on", "images"}
        assert (done["format"], done["folder"]) == (one, str(tmp_path / one))
    classifier = Classifier.load(Path("runs", tuned))
    files = sorted(photos.rglob("*.png"))[::8]
    images = torch.stack([classifier.backbone.transform(Image.open(file)) for file in files])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        check_as_a_stranger(classifier, ("timm", "torch", "onnx"), images)


def test_the_words_say_how_to_prepare_an_image() -> None:
    classifier = fitted("timm:test_resnet")
    ep.export(classifier, format="torch", output="out")
    said = json.loads(Path("out/preprocessing.json").read_text())
    assert said["input"]["shape"] == ["N", 3, 160, 160]
    transform, [resize, crop] = said["transform"], said["steps"][1:3]
    side, filter_name = transform["resize_size"], transform["interpolation"]
    assert resize == f"resize to {side} px on the short side, {filter_name} of Pillow (antialiased)"
    assert crop.startswith("cut out the centre, 160 px high and 160 px wide")
    image = Image.new("RGB", (side, side))
    image.paste((200, 100, 50), (side // 2, 0, side, side))
    first = (side - 160) // 2
    pixels = np.asarray(image.crop((first, first, first + 160, first + 160)), dtype=np.float32)
    by_hand = (pixels / 255 - np.float32(transform["mean"])) / np.float32(transform["std"])
    np.testing.assert_allclose(classifier.backbone.transform(image).permute(1, 2, 0), by_hand, atol=1e-5)


def random_classifier(*layers: str | None, name: str = "timm:test_resnet", other: str | None = None) -> Classifier:
    """A random head on layers of one model, or of two."""
    parts, dims = [], 0
    for layer, one in zip(layers, [name, *[other or name] * len(layers)], strict=False):
        backbone = ep.load_backbone(one, weights="none", layer=layer)
        loader = {"name": one, "weights": "none", "layer": layer}
        parts.append(Reference(space_spec(backbone, "fp32", "float32"), loader))
        dims += backbone.feature_dim
    weight = np.random.default_rng(0).normal(size=(3, dims)).astype(np.float32)
    head = LinearHead(weight, np.zeros(3, np.float32), ("a", "b", "c"))
    return Classifier(head, Reference(parts[0].spec, parts[0].loader, tuple(parts[1:])))


@pytest.mark.parametrize("layers", [("layer2",), pytest.param(("layer3", None), marks=pytest.mark.slow)])
def test_other_layers_leave_as_a_graph_alone(layers: tuple[str | None, ...]) -> None:
    classifier = random_classifier(*layers)
    for one in ("torch", "onnx"):
        assert ep.export(classifier, format=one, output=one).checked_on == "random"  # type: ignore[arg-type]
    check_as_a_stranger(classifier, ("torch", "onnx"), torch.randn(5, 3, 160, 160))
    with pytest.raises(UsageError, match="has no place for a head on the layer layer"):
        ep.export(classifier, output="timm")
    assert not Path("timm").exists()


def test_heads_that_cannot_leave() -> None:
    two = random_classifier(None, None, name="torchvision:squeezenet1_0", other="torchvision:squeezenet1_1")
    assert two.backbones[0].transform == two.backbones[1].transform
    for classifier in (two, random_classifier(None, None, other="timm:test_vit")):
        with pytest.raises(UsageError, match="fitted on 2 backbones, expected one model"):
            ep.export(classifier, format="torch", output="out")
    linear = random_classifier(None)
    X = np.eye(3, linear.head.weight.shape[1], dtype=np.float32)  # type: ignore[union-attr]
    knn = Classifier(fit_knn(X, [0, 1, 2], classes=("a", "b", "c"), k=1), linear.reference)
    with pytest.raises(UsageError, match="has a kNN head, expected a linear one"):
        ep.export(knn, output="out")
    assert not list(Path().iterdir())


def test_what_gives_other_logits_is_removed(run: Run, photos: Path) -> None:
    """Logits beyond the range of float32, which our own head computes in float64."""
    run("extract", photos, *TINY)
    name = run("fit-head", "--l2", 0.1, "--json").data["run"]
    head = LinearHead.load(Path("runs", name))
    LinearHead(np.full_like(head.weight, 3e38), head.bias, head.classes).save(Path("runs", name))
    before = set(Path().iterdir())
    for one in ("timm", "torch", "onnx"):
        ended = run("export", name, "--format", one)
        assert ended.code == 4
        assert "differ by inf from" in ended.line or "differ by nan from" in ended.line
    assert set(Path().iterdir()) == before


def test_the_tolerance_is_a_part_of_the_largest_logit(tmp_path: Path) -> None:
    classifier = random_classifier(None)
    head, images = classifier.head, torch.zeros(2, 3, 160, 160)
    assert isinstance(head, LinearHead)
    write_model(classifier.backbones, head, tmp_path)
    largest = max(1.0, np.abs(head.logits(classifier.backbone.module(images).numpy())).max())
    for part, fits in ((0.9e-4, True), (1.1e-4, False)):
        other = LinearHead(head.weight, (head.bias + part * largest).astype(np.float32), head.classes)
        with nullcontext() if fits else pytest.raises(ModelMismatch, match="expected at most"):
            found = check_logits(FORMATS["timm"], tmp_path, classifier, other, images)
            assert found == pytest.approx(part * largest, rel=0.01)


def test_a_graph_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with (
        pytest.raises(UsageError, match="cannot export timm:test_resnet in this format"),
        library_errors("timm:test_resnet"),
    ):
        FORMATS["onnx"].open(tmp_path)(torch.zeros(1, 3, 8, 8))


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=r"out exists already"):
        ep.export(random_classifier(None), output="out")
    assert not list((tmp_path / "out").iterdir())


def test_wrong_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("export", "nothing").code == 2
    assert "no run 'nothing'" in run("export", "nothing").line
    assert run("export", "nothing", "--format", "tflite").code == 2
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    ended = run("export", "nothing", "--format", "onnx")
    assert ended.code == 2
    assert "--format onnx needs onnxscript; pip install 'embedpipe[onnx]'" in ended.line

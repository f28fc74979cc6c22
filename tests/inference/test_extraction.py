"""Features from the command line against the plain recipe: library model, library transform, PIL, one image at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from tests.conftest import Run


@pytest.fixture
def jpegs(tmp_path: Path) -> list[Path]:
    """Crops of two real photographs, of odd sizes, as JPEG."""
    folder = tmp_path / "jpegs"
    folder.mkdir()
    paths = []
    for p, photo in enumerate(load_sample_images().images):
        for k, (height, width) in enumerate([(427, 640), (301, 223), (180, 333), (224, 224), (90, 77)]):
            paths.append(folder / f"{p}{k}.jpg")
            Image.fromarray(photo[:height, :width]).save(paths[-1], quality=90)
    return paths


def plain_timm(paths: list[Path], weights: Path) -> np.ndarray:
    torch.manual_seed(5)
    model = timm.create_model("resnet18").eval()
    save_file(model.state_dict(), weights)
    model.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return np.concatenate([model(transform(Image.open(p))[None]).numpy() for p in paths])


def plain_torchvision(paths: list[Path], weights: Path) -> np.ndarray:
    torch.manual_seed(5)
    model = torchvision.models.mobilenet_v3_small(weights=None).eval()
    torch.save(model.state_dict(), weights)
    model.classifier[3] = torch.nn.Identity()
    transform = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    with torch.inference_mode():
        return np.concatenate([model(transform(Image.open(p))[None]).numpy() for p in paths])


def from_command_line(run: Run, folder: Path, *arguments: object) -> tuple[np.ndarray, list[str]]:
    """Return features and paths as plain h5py reads them."""
    data = run("extract", folder, *arguments, "--json").data
    with h5py.File(data["features"]) as file:
        rows = {key.tobytes(): row for key, row in zip(file["keys"][()], file["features"][()], strict=True)}
    with h5py.File(Path("cache") / "datasets" / f"{data['dataset']}.h5") as table:
        paths = [path.decode() for path in table["path"][()]]
        return np.stack([rows[key.tobytes()] for key in table["key"][()]]), paths


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(
    ("recipe", "name", "suffix"),
    [(plain_timm, "timm:resnet18", "safetensors"), (plain_torchvision, "torchvision:mobilenet_v3_small", "pth")],
)
def test_features_equal_the_plain_recipe(run, jpegs, tmp_path, recipe, name, suffix) -> None:  # type: ignore[no-untyped-def]
    weights = tmp_path / f"weights.{suffix}"
    wanted = recipe(jpegs, weights)
    found, paths = from_command_line(run, jpegs[0].parent, "--backbone", name, "--weights", weights, "--batch-size", 4)
    assert paths == [path.name for path in jpegs]
    assert cosine_distance(found, wanted).max() < 1e-7
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    shuffled = np.roll(wanted, 1, axis=0)
    assert cosine_distance(found, shuffled).min() > 1e-4  # the measure can tell images apart


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])  # kernels of the second depend on the batch
def test_a_row_does_not_depend_on_its_batch(run: Run, photos: Path, name: str) -> None:
    """The last batch is padded: the same bits whether an image comes first, last or alone."""
    flags = ["--backbone", name, "--weights", "none", "--image-size", 64, "--batch-size", 16]
    whole, _ = from_command_line(run, photos, *flags)
    shutil.rmtree("cache")
    (photos / "alone" / "one").mkdir(parents=True)
    shutil.copy(photos / "red" / "005.png", photos / "alone" / "one")
    alone, _ = from_command_line(run, photos / "alone", *flags)
    assert alone.tobytes() == whole[29:30].tobytes()


def test_features_that_overflow_float16_are_failures(run: Run, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layer4"):
                parameter.mul_(1e4)
    save_file(model.state_dict(), tmp_path / "huge.safetensors")
    flags = ["--backbone", "test_resnet", "--weights", tmp_path / "huge.safetensors"]
    done = run("extract", photos, *flags, "--store-dtype", "float16", "--json")
    assert done.code == 3
    assert len(done.data["failed"]) == 36
    reasons = {failure["reason"] for failure in done.data["failed"]}
    assert reasons == {"a feature is too large for float16; try --store-dtype float32"}
    assert run("extract", photos, *flags, "--json").data["failed"] == []


@pytest.mark.parametrize(("layer", "named"), [("layer2.0.conv1", "layer2.0.conv1"), ("layer4.1.bn2", "layer4.1.bn2")])
def test_the_layer_at_fault_is_named(run: Run, photos: Path, tmp_path: Path, layer: str, named: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    with torch.no_grad():
        model.get_parameter(f"{layer}.weight").view(-1)[0] = float("nan")
    save_file(model.state_dict(), tmp_path / "broken.safetensors")
    flags = ["--backbone", "resnet18", "--weights", tmp_path / "broken.safetensors", "--image-size", 32, "--limit", 2]
    done = run("extract", photos, *flags, "--json")
    assert done.code == 3
    reason = f"the output of layer {named!r} is not finite in fp32; are the weights damaged?"
    assert [(failure["stage"], failure["reason"]) for failure in done.data["failed"]] == [("forward", reason)] * 2
    assert done.data["rows"] == 0
    assert run("extract", photos, *flags, "--json").data["failed"] == done.data["failed"]  # tried again, not remembered

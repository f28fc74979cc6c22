"""What shapes a feature changes the fingerprint, each thing by itself; what does not shape one never does."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from embedpipe.backbones import Backbone, load_backbone
from embedpipe.images import Transform
from embedpipe.images import _transform as transforms
from embedpipe.inference import InferenceSettings, space_spec
from embedpipe.provenance import fingerprint
from tests.conftest import TINY, Run, write_photos

ARITHMETIC = {"precision": "fp32", "store_dtype": "float32"}
BASE = {"name": "timm:test_resnet", "weights": "none", "image_size": 64}


def load(**changes: Any) -> Backbone:
    return load_backbone(**{**BASE, **changes})


def identity(backbone: Backbone | None = None, **changes: str) -> str:
    return fingerprint(space_spec(backbone or load(), **{**ARITHMETIC, **changes}))


def saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Save the weights of the base backbone after a change to them."""
    state = {name: tensor.clone() for name, tensor in load().module.model.state_dict().items()}
    change(state)
    path = folder / f"{len(list(folder.iterdir()))}.pth"
    torch.save(state, path)
    return path


def flip_one_bit(name: str, place: int, bit: int) -> Callable[[dict[str, torch.Tensor]], object]:
    def flip(state: dict[str, torch.Tensor]) -> None:
        raw = state[name].flatten().view(torch.int32)
        raw[place % raw.numel()] ^= 1 << bit

    return flip


def mutations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Yield (what was changed, fingerprint), one change at a time."""
    for precision in ("bf16", "fp16"):
        yield f"precision {precision}", identity(precision=precision)
    yield "stored dtype", identity(store_dtype="float16")
    yield "seed of random weights", identity(load(seed=1))
    for bit, place in ((0, 0), (0, -1), (22, 100), (31, 7)):
        path = saved(folder, flip_one_bit("conv1.0.weight", place, bit))
        yield f"bit {bit} of weight {place}", identity(load(weights=path))
    yield (
        "one bit of a running mean",
        identity(load(weights=saved(folder, flip_one_bit("conv1.1.running_mean", 0, 31)))),
    )
    yield "architecture", identity(load(name="timm:test_efficientnet"))
    yield "layer", identity(load(layer="layer4"))
    yield "another layer", identity(load(layer="layer3"))
    yield "pool", identity(load(layer="layer4", pool="max"))
    yield "image size", identity(load(image_size=96))
    yield "crop", identity(load(crop_pct=0.5))
    yield "interpolation", identity(load(interpolation="nearest"))
    yield "build option", identity(load(name="timm:test_vit", image_size=64))
    yield "build option: another", identity(load(name="timm:test_vit", image_size=96))
    plain = load().transform
    assert isinstance(plain, Transform)
    for name, value in {
        "mean": (0.4, *plain.mean[1:]), "std": (*plain.std[:2], 0.6), "channels": "bgr",
        "crop_size": (64, 65), "resize_size": (70, 70), "resize_mode": "squash", "interpolation": "hamming",
    }.items():  # fmt: skip
        changes = {name: value, **({"resize_size": (64, 64)} if name == "resize_mode" else {})}
        yield f"transform: {name}", identity(load(transform=replace(plain, **changes)))
    yield (
        "one unit in the last place of a mean",
        identity(load(transform=replace(plain, mean=(math.nextafter(plain.mean[0], 1), *plain.mean[1:])))),
    )
    for name, value in transforms.POLICIES.items():
        with monkeypatch.context() as patched:
            patched.setitem(transforms.POLICIES, name, f"not {value}")
            yield f"policy: {name}", identity()
    backbone = load()
    for name, value in {"source": "torchvision", "schema": 2, "build": {"act": "relu"}, "more": 1}.items():
        yield f"spec: {name}", identity(replace(backbone, spec={**backbone.spec, name: value}))
    yield "view", fingerprint({**space_spec(backbone, **ARITHMETIC), "view": 1})
    for persistent in (True, False):
        for value in (1.0, 2.0):
            scaled = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
            torch.nn.init.ones_(scaled[0].weight)
            torch.nn.init.zeros_(scaled[0].bias)
            scaled.register_buffer("scale", torch.tensor([value]), persistent=persistent)
            yield f"a buffer of a module of one's own: {value}, {persistent}", identity(load_module(scaled))


def load_module(module: torch.nn.Module) -> Backbone:
    return load_backbone(module, transform=Transform((32, 32), 32))


def test_whatever_shapes_a_feature_is_another_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    found = {"nothing": identity()}
    for what, changed in mutations(tmp_path / "weights", monkeypatch):
        assert changed not in found.values(), f"{what} gave the fingerprint of {found}"
        found[what] = changed
    assert len(found) > 40
    assert identity() == found["nothing"]


def test_what_does_not_shape_a_feature_is_the_same_space(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    base, same = identity(), lambda state: None
    paths = [saved(tmp_path / "weights", same) for _ in range(2)]
    os.utime(paths[1], (1, 1))
    for path in (*paths, Path(os.path.relpath(paths[0]))):
        assert identity(load(weights=path)) == base
    reordered = dict(reversed(list(torch.load(paths[0]).items())))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in reordered.items()}}, paths[1])
    assert identity(load(weights=paths[1])) == base
    with_head = {**reordered, "fc.weight": torch.ones(5, 3), "fc.bias": torch.ones(5)}
    torch.save(with_head, paths[1])
    assert identity(load(weights=paths[1])) == base  # the classifier is no part of a feature
    assert identity(load(name="test_resnet")) == base
    assert identity(load(seed=0, pool="auto")) == base
    for _ in range(2):
        torch.rand(3)
        assert identity() == base
    pins = set(InferenceSettings().pins)
    assert not pins & set(space_spec(load(), **ARITHMETIC))


@pytest.fixture
def extracted(tmp_path: Path, run: Run) -> Callable[..., dict[str, Any]]:
    write_photos(tmp_path / "work" / "photos", per_class=3)

    def extract(*arguments: object) -> dict[str, Any]:
        ended = run("extract", *arguments, *TINY, "--json")
        assert ended.code == 0, ended.err
        return ended.data

    return extract


@pytest.mark.timeout(300)
def test_options_that_shape_a_feature_compute_all_anew(extracted: Callable[..., dict[str, Any]]) -> None:
    seen = {extracted("photos")["fingerprint"]}
    for flags in (
        ("--precision", "bf16"), ("--store-dtype", "float16"), ("--image-size", 96), ("--crop-pct", 0.5),
        ("--interpolation", "nearest"), ("--layer", "layer4"), ("--layer", "layer4", "--pool", "max"), ("--seed", 1),
    ):  # fmt: skip
        data = extracted("photos", *flags)
        assert (data["computed"], data["reused"]) == (9, 0), flags
        assert data["fingerprint"] not in seen, flags
        seen.add(data["fingerprint"])


@pytest.mark.timeout(300)
def test_all_else_computes_nothing(
    tmp_path: Path, extracted: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    first = extracted("photos")
    assert first["computed"] == 9

    def hit(*arguments: object) -> None:
        data = extracted(*arguments)
        assert (data["computed"], data["fingerprint"]) == (0, first["fingerprint"]), arguments

    hit("photos", "--workers", 1, "--batch-size", 3, "--shard-rows", 2, "--val-fraction", 0.4, "--split-by", "hash")
    hit(work / "photos")
    hit("photos", "--limit", 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        hit("photos", "--device", "cpu")
    finally:
        torch.set_num_threads(threads)
    for path in work.glob("photos/*/*"):
        os.utime(path, (time.time() - 1e6,) * 2)
    hit("photos")
    shutil.copytree(work / "photos", work / "elsewhere" / "copy")
    hit("elsewhere/copy")
    hit("elsewhere/copy", "photos")
    hit("photos", "elsewhere/copy")
    shutil.move(work / "photos", work / "moved")
    (work / "moved" / "red").rename(work / "moved" / "crimson")  # other labels
    for path in list(work.glob("moved/blue/*")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    hit("moved")
    (work / "split" / "train").mkdir(parents=True)
    shutil.move(work / "moved" / "crimson", work / "split" / "train" / "red")
    shutil.move(work / "moved" / "blue", work / "split" / "train" / "blue")
    shutil.move(work / "moved", work / "split" / "test")  # other splits
    hit("split")
    (work / "deeper").mkdir()
    monkeypatch.chdir(work / "deeper")
    hit("../split", "--cache-dir", "../cache")


def test_the_bytes_of_a_file_are_its_key(tmp_path: Path, extracted: Callable[..., dict[str, Any]]) -> None:
    extracted("photos")
    path = tmp_path / "work" / "photos" / "red" / "000.png"
    with Image.open(path) as image:
        image.load()
        pixel = image.getpixel((0, 0))
        image.putpixel((0, 0), tuple(255 - value for value in pixel))  # type: ignore[union-attr]
        status = path.stat()
        image.save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert extracted("photos")["computed"] == 1

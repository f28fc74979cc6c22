"""Leaks in pieces of photographs: copies encoded, shifted or brightened anew are found, distinct pieces hardly ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import embedpipe as ep
from embedpipe.classifier import Scored
from embedpipe.errors import EmbedpipeWarning
from embedpipe.selection import find_leaks, find_near
from tests.conftest import write_photos

TILE = 70  # pixels
QUALITY = 95


def write_tiles(folder: Path) -> list[Path]:
    """Cut two photographs into 108 tiles that do not overlap, as JPEG files."""
    paths = []
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for k in range(54):
            y, x = TILE * (k // 9), TILE * (k % 9)
            path = folder / name / f"{k:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[y : y + TILE, x : x + TILE]).save(path, quality=QUALITY)
            paths.append(path)
    return paths


def vary(path: Path, folder: Path) -> None:
    """Write what a careless hand makes of an image: encoded anew, shifted by a pixel, a little brighter."""
    pixels = np.asarray(Image.open(path))
    bright = np.clip(pixels.astype(float) * 1.08, 0, 255).astype(np.uint8)
    kinds = {"encoded": (pixels, 85), "shifted": (np.roll(pixels, 1, axis=1), QUALITY), "bright": (bright, QUALITY)}
    for kind, (changed, quality) in kinds.items():
        target = folder / kind / f"{path.parent.name}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(changed).save(target, quality=quality)


def extract(lines: list[str]) -> ep.FeatureSet:
    Path("list.csv").write_text("\n".join(["path,label,split,group", *lines]) + "\n")
    return ep.extract("list.csv", ep.load_backbone("timm:tf_efficientnet_lite0", weights="packaged"), batch_size=8)


@pytest.fixture
def tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    return write_tiles(Path("tiles"))


def test_near_copies_are_found_and_distinct_images_are_not(tiles: list[Path]) -> None:
    busy = [p for p in tiles if np.asarray(Image.open(p).convert("L")).std() > 30]  # no sky
    copied = busy[::8]
    for path in copied:
        vary(path, Path("made"))
    made = sorted(Path("made").rglob("*.jpg"))
    held = busy[4::8]
    features = extract(
        [f"{p},{p.parent.name},{'val' if p in held else 'train'}," for p in busy]
        + [f"{p},{p.name.partition('-')[0]},test," for p in made]
    )
    leaks, ratio, skipped = find_near(features)
    assert skipped is None
    assert sum(leak.sample.split == "val" for leak in leaks) <= 1  # tiles of one photograph
    twins = {leak.sample.path: leak.twin.path for leak in leaks}
    right = [str(p) for p in made if twins.get(str(p), "").removeprefix("tiles/").replace("/", "-") == p.name]
    for kind in ("encoded", "shifted", "bright"):
        hits = sum(f"/{kind}/" in path for path in right)
        least = 0.5 if kind == "encoded" else 0.8  # blocks of 8 pixels are large in tiles of 70
        assert hits >= least * len(copied), (kind, hits, len(copied), ratio)


@pytest.fixture
def leaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.FeatureSet:
    """30 training images; two copies in val and one in test, one of val in test, and a patient in train, val and test."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for split, count in (("train", 15), ("val", 5), ("test", 6)):
        for path in sorted(write_photos(Path(split), per_class=count, classes=("blue", "red")).rglob("*.png")):
            path.write_bytes(path.read_bytes() + split.encode())  # other content
            lines.append(f"{path},{path.parent.name},{split},{'p1' if path.name == '004.png' else ''}")
    for source, target in (
        ("train/red/000", "val/red/a"),
        ("train/red/001", "val/red/b"),
        ("train/red/000", "test/red/a"),
    ):
        shutil.copy(f"{source}.png", f"{target}.png")
        lines.append(f"{target}.png,red,{target.partition('/')[0]},")
    shutil.copy("val/blue/001.png", "test/blue/v.png")
    Path("list.csv").write_text("\n".join(["path,label,split,group", *lines, "test/blue/v.png,blue,test,"]) + "\n")
    return ep.extract("list.csv", ep.load_backbone("timm:test_resnet", weights="none"))


def scored(features: ep.FeatureSet, wrong: set[str]) -> dict[str, Scored]:
    """Predictions that are right but for some paths."""
    made = {}
    for split in features.splits:
        samples = features.samples(split, labelled=True)
        right = np.array([features.classes.index(s.label or "") for s in samples])
        answers = np.array([s.path in wrong for s in samples]) ^ right.astype(bool)
        made[split] = Scored(samples, np.eye(2)[answers.astype(int)])
    return made


def test_every_kind_of_leak_is_counted_once(leaky: ep.FeatureSet) -> None:
    with pytest.warns(EmbedpipeWarning, match="images that are also in an earlier split"):
        report = find_leaks(leaky, scored(leaky, set()))
    assert report["duplicates_of_train"] == {"val": 2, "test": 1}
    assert report["duplicates_of_val"] == {"test": 1}
    assert report["near_duplicates_of_train"] == {"val": 10, "test": 13}  # the same pixels under other bytes
    assert report["groups_across_splits"] == 1
    assert report["groups"] == [{"group": "p1", "splits": {"train": 2, "val": 2, "test": 2}}]
    assert report["leaked"] == {"val": 12, "test": 14}
    assert report["accuracy_without_leaks"]["test"] == {"accuracy": None, "accuracy_ci95": None, "n": 0}
    assert [pair["kind"] for pair in report["pairs"]] == ["exact"] * 4 + ["near"] * 16
    first = report["pairs"][0]
    assert (first["path"], first["twin"], first["twin_split"]) == ("val/red/a.png", "train/red/000.png", "train")


def test_accuracy_without_leaks_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for path in write_photos(Path("data") / split, per_class=count, classes=("blue", "red")).rglob("*.png"):
            path.write_bytes(path.read_bytes() + split.encode())
    for k in range(2):
        shutil.copy(f"data/train/red/00{k}.png", f"data/test/red/copy{k}.png")
    features = ep.extract("data", ep.load_backbone("timm:test_resnet", weights="none"))
    wrong = {"test/red/000.png", "test/blue/000.png", "test/red/copy0.png"}
    with pytest.warns(EmbedpipeWarning, match=r"2 of test \(accuracy without them 0\.7500\)"):
        report = find_leaks(features, scored(features, wrong))
    assert (
        report["near_skipped"]
        == "12 training images, at least 20 are needed to estimate how similar different images are"
    )
    assert report["near_duplicates_of_train"] is None
    without = report["accuracy_without_leaks"]["test"]
    assert (without["accuracy"], without["n"]) == (0.75, 8)
    assert without["accuracy_ci95"][0] < 0.75 < without["accuracy_ci95"][1]
    assert report["accuracy_without_leaks"]["val"]["n"] == 4

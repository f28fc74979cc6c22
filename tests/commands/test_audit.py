"""The audit of real digits: labels that were changed are found, and so are strangers and copies."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import embedpipe as ep
from embedpipe.errors import EmbedpipeWarning, UsageError
from tests.conftest import TINY, Run, write_photos

DIGITS, FLIPS = 400, 20  # 5 %


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Handwritten digits as tiny PNG files and a table of labels; return the paths whose label is wrong."""
    monkeypatch.chdir(tmp_path)
    data, rng = load_digits(), np.random.default_rng(0)
    flipped = set(rng.permutation(DIGITS)[:FLIPS].tolist())
    lines, wrong = ["path,label"], set()
    for k in range(DIGITS):
        path, label = Path(f"{k:03d}.png"), int(data.target[k])
        Image.fromarray(np.pad((data.images[k] * (255 / 16)).round().astype(np.uint8), 1)).save(path)
        if k in flipped:
            label = (label + int(rng.integers(1, 10))) % 10
            wrong.add(str(path))
        lines.append(f"{path},{label}")
    shutil.copy("005.png", "copy.png")
    Image.fromarray(np.asarray(Image.open("006.png"))).save("near.png", compress_level=0)
    lines += [f"copy.png,{data.target[5]}", f"near.png,{data.target[6]}"]
    for k in range(3):  # no digits at all
        stripes = np.tile((np.arange(10) % 2 * 255).astype(np.uint8), (10, 1))
        Image.fromarray(np.rot90(stripes, k)[:, : 10 - k]).save(f"stripes{k}.png")
        lines.append(f"stripes{k}.png,{k}")
    Path("list.csv").write_text("\n".join(lines) + "\n")
    return wrong


def test_flipped_labels_strangers_and_copies_of_digits(digits: set[str]) -> None:
    features = ep.extract("list.csv", ep.load_backbone("timm:tf_efficientnet_lite0", weights="packaged"), batch_size=8)
    done = ep.audit(features)
    named = {issue.path for issue in done.issues if issue.kind == "label"} - {f"stripes{k}.png" for k in range(3)}
    hits = named & digits
    assert len(hits) / FLIPS >= 0.7
    assert len(hits) / len(named) >= 0.3
    first = [issue.path for issue in done.issues if issue.kind == "label"][:10]
    assert len(set(first) & digits) >= 4
    strangers = {issue.path for issue in done.issues if issue.kind == "outlier"}
    assert strangers & {f"stripes{k}.png" for k in range(3)}
    assert len(strangers) < 12
    copies = {issue.path: (issue.twin, issue.score) for issue in done.issues if issue.kind == "duplicate"}
    assert copies["copy.png"] == ("005.png", 1.0)
    assert copies["near.png"][0] == "006.png"
    assert len(copies) <= 4
    rows = list(csv.DictReader(done.csv.read_text().splitlines()))
    assert [(row["path"], row["kind"]) for row in rows] == [(issue.path, issue.kind) for issue in done.issues]
    assert done.counts == {kind: sum(row["kind"] == kind for row in rows) for kind in ("label", "outlier", "duplicate")}


def test_the_command(run: Run, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    shutil.copy(photos / "red" / "000.png", photos / "red" / "again.png")
    shutil.copy(photos / "red" / "001.png", photos / "blue" / "wrong.png")
    run("extract", photos, *TINY)
    data = run("audit", "--json").data
    assert set(data) == {"dataset", "n", "folds", "issues", "counts", "csv"}
    assert data["n"] == 38
    labels = {Path(one["path"]).name: one["suggested"] for one in data["issues"] if one["kind"] == "label"}
    assert labels["wrong.png"] == "red"
    twins = {Path(one["twin"]).name: one for one in data["issues"] if one["kind"] == "duplicate" and one["score"] == 1}
    assert Path(twins["000.png"]["path"]).name == "again.png"
    assert twins["000.png"]["suggested"] is None
    wrong = next(
        one for one in data["issues"] if one["kind"] == "duplicate" and one["label"] != one["suggested"] is not None
    )
    assert {Path(wrong["path"]).name, Path(wrong["twin"]).name} == {"wrong.png", "001.png"}
    assert json.loads(Path(data["csv"]).with_name("run.json").read_text())["report"]["counts"] == data["counts"]
    text = run("audit", "--folds", 3).out
    assert "wrong.png" in text
    assert "38 labelled images" in text
    assert run("finetune", "--unfreeze", "layer4").code == 2  # an audit is no run to start from


def test_few_images_are_audited_by_label_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_photos(Path("photos") / split, per_class=2)
    for path in Path("photos/val").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"val")
    features = ep.extract("photos", ep.load_backbone("timm:test_resnet", weights="none"))
    with pytest.warns(EmbedpipeWarning, match="no search for outliers and near copies among 12 images"):
        done = ep.audit(features, folds=2, l2=0.01)
    assert done.counts["outlier"] == 0
    with pytest.raises(UsageError, match="13 folds of 12 separate images"):
        ep.audit(features, folds=13)

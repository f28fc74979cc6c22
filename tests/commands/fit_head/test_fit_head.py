"""fit_head on a real data set: copies across splits are counted, and what --refit adds is val."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import embedpipe as ep
from embedpipe.commands.fit_head._fit_head import _warn_at_edge
from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.heads import fit_linear, fit_path
from tests.conftest import TINY, Run, write_photos

CLASSES = ("blue", "red")
pytestmark = pytest.mark.filterwarnings("ignore:images that are also in an earlier split")


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.FeatureSet:
    """Split folders; one image of val and two of test are copies of training images, one of them mislabelled."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        write_photos(tmp_path / "data" / split, per_class=count, classes=CLASSES)
        for k, path in enumerate(sorted((tmp_path / "data" / split).rglob("*.png"))):
            path.write_bytes(path.read_bytes() + f"{split} {k}".encode())  # same pixels, other content
    shutil.copy("data/train/red/000.png", "data/val/red/copy.png")
    shutil.copy("data/train/red/001.png", "data/test/red/copy.png")
    shutil.copy("data/train/red/002.png", "data/test/blue/copy.png")
    with pytest.warns(
        EmbedpipeWarning, match=r"1 image\(s\) with several labels, the first: test/blue/copy\.png and train"
    ):
        return ep.extract("data", ep.load_backbone("timm:test_resnet", weights="none"))


def test_copies_of_training_images_are_counted(features: ep.FeatureSet) -> None:
    report = ep.fit_head(features).report
    leaks = report["leaks"]
    assert leaks["duplicates_of_train"] == {"val": 1, "test": 2}
    assert leaks["leaked"] == {"val": 1, "test": 2}
    assert leaks["accuracy_without_leaks"]["test"]["n"] == report["metrics"]["test"]["n"] - 2


def test_a_run_says_what_it_was_asked_for(features: ep.FeatureSet) -> None:
    done = ep.fit_head(features, class_weight="balanced", refit=True, shots=2)
    assert done.folder is not None
    options = json.loads((done.folder / "run.json").read_text())["report"]["options"]
    assert (options["class_weight"], options["refit"], options["l2"], options["shots"]) == ("balanced", True, "auto", 2)
    assert not {"features", "cache_dir", "given"} & set(options)


def test_a_data_set_is_named_by_its_path_too(features: ep.FeatureSet) -> None:
    assert ep.fit_head(Path("data"), l2=0.1).report["dataset"] == features.dataset


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ({"class_weight": {"red": 2}}, "class_weight is {'red': 2}, expected none or balanced"),
        ({"l2": None}, "l2 = None, expected a positive number"),
        ({"solver": "knn", "l2": 0.1}, "--solver knn does not use --l2"),
        ({"solver": "knn", "class_weight": "balanced"}, "--solver knn does not use --class-weight"),
        ({"solver": "knn", "standardize": False}, "--solver knn does not use --no-standardize"),
    ],
)
def test_options_that_would_be_taken_for_something_else(
    option: dict[str, Any], found: str, features: ep.FeatureSet
) -> None:
    with pytest.raises(UsageError, match=re.escape(found)):
        ep.fit_head(features, **option)


def test_the_path_is_drawn(features: ep.FeatureSet) -> None:
    run = ep.fit_head(features)
    assert run.folder is not None
    drawn = ElementTree.fromstring((run.folder / "l2_path.svg").read_text())
    texts = [element.text for element in drawn.iter() if element.text]
    assert {
        "accuracy, held out",
        "log loss, held out",
        "objective on train",
        f"l2, chosen: {run.report['l2']:.3g}",
        "1e-6",
        "1e2",
    } <= {*texts}
    lines = [element.attrib["points"].split() for element in drawn.iter() if "points" in element.attrib]
    assert [len(line) for line in lines] == [len(run.report["l2_path"])] * 3
    heights = [float(place.partition(",")[2]) for place in lines[-1]]
    assert heights == sorted(heights, reverse=True)  # the objective rises with l2, upwards
    one = ep.fit_head(features, l2=0.1)
    assert one.folder is not None
    assert not (one.folder / "l2_path.svg").exists()


@pytest.mark.filterwarnings("always:the best l2")
@pytest.mark.parametrize(
    ("kind", "warned"),
    [("plain", ""), ("separable", "a smaller one may be better, see --l2 1e-07"), ("noise", "see --l2 1000$")],
)
def test_a_best_l2_on_the_edge_is_warned_of(kind: str, warned: str) -> None:
    """Separable features want no penalty, noise wants the largest one."""
    random = np.random.default_rng(0)
    y = np.arange(300) % 3
    X = np.eye(3)[y] * {"plain": 2, "separable": 9, "noise": 0}[kind] + random.uniform(-1, 1, size=(300, 3))
    X = X if kind != "plain" else X + random.normal(size=X.shape)
    path = fit_path(X[:150], y[:150], X[150:], y[150:], classes=("a", "b", "c"))
    with warnings.catch_warnings(record=True) as told:
        _warn_at_edge(path)
    assert len(told) == bool(warned)
    assert all(re.search(warned, str(one.message)) for one in told)


def test_curve_and_folds_leave_the_head_alone(features: ep.FeatureSet) -> None:
    plain = ep.fit_head(features, l2=0.01).report
    report = ep.fit_head(features, l2=0.01, shots="1,4,50%", repeats=3, folds=3).report
    assert report["metrics"] == plain["metrics"]
    assert "curve" not in plain
    assert "folds" not in plain
    assert [(p["shots"], p["n_train"], p["repeats"]) for p in report["curve"]] == [(1, 2, 3), (4, 8, 3), ("50%", 8, 3)]
    assert set(report["curve"][0]["metrics"]) == {"val", "test"}
    folds = report["folds"]
    assert (folds["k"], folds["n"], sum(one["n"] for one in folds["per_fold"])) == (3, 25, 25)
    assert folds["accuracy"] == pytest.approx(sum(one["n"] * one["accuracy"] for one in folds["per_fold"]) / 25)


def test_the_command_prints_curve_and_folds(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    out = run("fit-head", "--l2", 0.01, "--shots", "1,2", "--repeats", 2, "--folds", 3).out
    assert "shots" in out
    assert "3 folds over train and val" in out
    assert run("fit-head", "--shots", "0").code == 2


def test_refit_takes_val_in_and_keeps_l2(features: ep.FeatureSet) -> None:
    plain, again = ep.fit_head(features), ep.fit_head(features, refit=True)
    assert (plain.report["n_train"], again.report["n_train"]) == (16, 25)
    assert again.report["l2"] == plain.report["l2"]
    X, y = (np.concatenate(pair) for pair in zip(features.arrays("train"), features.arrays("val"), strict=True))
    wanted = fit_linear(X, y, classes=CLASSES, l2=plain.report["l2"])
    np.testing.assert_allclose(again.head.logits(X), wanted.logits(X), atol=1e-3)
    assert np.abs(plain.head.logits(X) - wanted.logits(X)).max() > 0.01


def test_balanced_classes_weigh_the_same(features: ep.FeatureSet) -> None:
    X, y = features.arrays("train")
    few = np.flatnonzero((y == 0) | (np.arange(len(y)) >= len(y) - 3))
    Path("list.csv").write_text(
        "path,label,split\n"
        + "".join(f"{features.paths('train')[k]},{CLASSES[y[k]]},train\n" for k in few)
        + "".join(f"{p},{Path(p).parent.name},val\n" for p in features.paths("val"))
    )
    uneven = ep.extract("list.csv", features.backbone)
    X, y = uneven.arrays("train")
    assert np.bincount(y).tolist() == [8, 3]
    head = ep.fit_head(uneven, class_weight="balanced", l2=1.0).head
    weight = np.where(y == 0, 11 / 2 / 8, 11 / 2 / 3)
    wanted = fit_linear(X, y, classes=CLASSES, l2=1.0, sample_weight=weight)
    np.testing.assert_allclose(head.logits(X), wanted.logits(X), atol=1e-4)


def test_features_that_do_not_fit_in_memory_give_the_same_head(photos: Path, tmp_path: Path) -> None:
    features = ep.extract(photos, ep.load_backbone("timm:test_resnet", weights="none"), cache_dir=tmp_path / "cache")
    held = 3 * 4 * features.feature_dim * sum(features.splits.values())  # as read, standardised, and what products take
    assert (features.fits(held), features.fits(held - 1)) == (True, False)
    heads = [ep.fit_head(features, runs_dir=tmp_path, max_memory=size) for size in ("1GB", "1B")]
    most = np.abs(heads[0].head.weight).max()
    np.testing.assert_allclose(heads[0].head.weight, heads[1].head.weight, atol=1e-5 * most)
    assert heads[0].report["metrics"].keys() == heads[1].report["metrics"].keys()
    assert heads[1].report["leaks"]["near_skipped"] == "the features exceed --max-memory"
    again = [ep.fit_head(features, runs_dir=tmp_path, max_memory=size, refit=True) for size in ("1GB", "1B")]
    np.testing.assert_allclose(again[0].head.weight, again[1].head.weight, atol=1e-5 * most)
    with pytest.raises(UsageError, match="lbfgs holds all features in memory"):
        ep.fit_head(features, runs_dir=tmp_path, max_memory="1B", solver="lbfgs")
    with pytest.raises(UsageError, match="--max-memory: got 'lots', expected a number and a unit such as 4GB"):
        ep.fit_head(features, runs_dir=tmp_path, max_memory="lots")

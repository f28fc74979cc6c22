"""Views are training rows of the images that they show; held-out images are clean, and counts are those of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedpipe as ep
from embedpipe.cache import Cache
from embedpipe.errors import UsageError
from embedpipe.features import open_features
from embedpipe.heads import fit_linear, select_rows
from embedpipe.selection import HeadConfig, read_views
from embedpipe.selection._views import select_views, training_rows
from tests.conftest import Run, write_photos

BACKBONE = {"backbone": "timm:test_resnet", "weights": "none"}


def write_stripes(folder: Path, train: int = 12, val: int = 30) -> Path:
    """Write two classes of striped images that differ in direction, light and noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val), ("test", 6)):
        for number in range(2):
            (folder / split / f"class{number}").mkdir(parents=True)
            for k in range(count):
                stripes = np.sin(np.arange(64) / rng.uniform(1, 4))[:, None].repeat(64, 1)
                pixels = 128 + 60 * (stripes if number else stripes.T)[..., None] + rng.normal(0, 50, (64, 64, 3))
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(folder / split / f"class{number}" / f"{k}.png")
    return folder


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.FeatureSet:
    monkeypatch.chdir(tmp_path)
    return ep.extract(write_stripes(tmp_path / "stripes"), **BACKBONE, views=3)


def test_each_image_weighs_one() -> None:
    X, y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1])
    views = 10 + np.arange(6.0).reshape(3, 2), np.array([0, 0, 2])
    rows, targets, weights = training_rows(X, y, views)
    np.testing.assert_array_equal(rows, np.concatenate([X, views[0]]))
    np.testing.assert_array_equal(targets, [0, 1, 0, 1, 0, 0, 0])
    assert weights is not None
    np.testing.assert_allclose(weights, [0.5, 1, 0.5, 1, 0.25, 0.25, 0.5])
    balanced = training_rows(X, y, views, np.array([2.0, 1, 4, 1]))[2]
    assert balanced is not None
    np.testing.assert_allclose(balanced, [1, 1, 2, 1, 0.5, 0.5, 2])
    some = select_views(views, np.array([1, 2]))
    assert some is not None
    np.testing.assert_array_equal(some[0], views[0][[2]])
    np.testing.assert_array_equal(some[1], [1])
    assert select_views(views, np.array([1, 3])) is None


def test_views_show_the_images_that_they_are_added_to(features: ep.FeatureSet) -> None:
    samples = features.labelled_samples("train")
    views = read_views(features, samples, max_bytes=1e9)
    assert views is not None
    rows, image = views
    assert rows.shape == (3 * len(samples), features.feature_dim)
    np.testing.assert_array_equal(image, np.tile(np.arange(len(samples)), 3))
    one = features.views()[1]
    assert one.space.spec["view"] == 2
    np.testing.assert_array_equal(rows[len(samples) : 2 * len(samples)], one.read(samples))
    chunked = read_views(features, samples, max_bytes=1)
    assert chunked is not None
    np.testing.assert_array_equal(chunked[0][:], rows[:])
    np.testing.assert_array_equal(select_rows(chunked[0], np.array([1, 40]))[:], rows[[1, 40]])


def test_a_head_is_fitted_on_views_where_they_lower_the_log_loss(features: ep.FeatureSet) -> None:
    plain, fitted = ep.fit_head(features, views="off"), ep.fit_head(features)
    tried = fitted.report["views"]
    assert plain.report["views"] is None
    assert (tried["augment"], tried["seed"], tried["count"]) == ("standard", 0, 3)
    assert tried["used"] == (tried["val_log_loss"] < tried["val_log_loss_without"])
    assert tried["val_log_loss_without"] == pytest.approx(plain.report["metrics"]["val"]["log_loss"])
    expected = tried["val_log_loss"] if tried["used"] else tried["val_log_loss_without"]
    assert fitted.report["metrics"]["val"]["log_loss"] == pytest.approx(expected)
    assert fitted.report["n_train"] == plain.report["n_train"] == 24
    assert fitted.report["metrics"]["test"]["n"] == 12
    samples = features.labelled_samples("train")
    X, y, weights = training_rows(
        *features.labelled("train", max_bytes=1e9), read_views(features, samples, max_bytes=1e9)
    )
    own = fit_linear(X, y, classes=features.classes, l2=fitted.report["l2"], sample_weight=weights)
    if tried["used"]:
        np.testing.assert_allclose(fitted.head.weight, own.weight, atol=1e-4 * np.abs(own.weight).max())


def test_a_fixed_l2_and_folds_use_views_too(features: ep.FeatureSet) -> None:
    tried = ep.fit_head(features, l2=0.01, folds=3, refit=True).report
    assert tried["views"]["val_log_loss"] is not None
    assert tried["folds"]["n"] == 84
    config = HeadConfig(features.classes)
    views = read_views(features, features.labelled_samples("train"), max_bytes=1e9)
    train, val = features.labelled("train", max_bytes=1e9), features.labelled("val", max_bytes=1e9)
    few = [part[:20] for part in val]
    path = config.select(*train, *few, views=views)
    assert path.selected_on == "folds"
    assert len(path.losses) == 44  # images; their views are never held out
    chunked = HeadConfig(features.classes, max_bytes=1e5).select(*train, *few, views=views)
    assert chunked.l2 == path.l2


def test_solvers_without_a_log_loss_leave_views_alone(features: ep.FeatureSet) -> None:
    for solver in ("ridge", "knn"):
        assert ep.fit_head(features, solver=solver).report["views"] is None


def test_views_of_several_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stripes = write_stripes(tmp_path / "stripes")
    ep.extract(stripes, **BACKBONE, views=2, layer=("layer1", "penultimate"))
    ep.extract(stripes, **BACKBONE, views=3, layer="layer1")
    cache = Cache(Path("cache"))
    both = open_features(cache, layer=("layer1", "penultimate"))
    assert [view.layers for view in both.views()] == [("layer1", "penultimate")] * 2
    assert len(both.only(both.spaces[:1]).views()) == 3
    assert ep.fit_head(both).report["views"]["count"] in (2, 3)
    ep.extract(write_photos(tmp_path / "photos"), "timm:test_vit", weights="none")
    assert open_features(cache, "stripes", layer="all").layers == ("layer1", "penultimate")
    assert open_features(cache, "stripes", layer="layer1").space.spec["view"] == 0
    ep.extract(stripes, **BACKBONE, views=1, augment="flip", layer="layer1")
    assert [view.space.spec["transform"]["augment"] for view in open_features(cache, layer="layer1").views()] == [
        "flip"
    ]


def test_predict_averages_views_and_caches_nothing(run: Run, features: ep.FeatureSet) -> None:
    fitted = ep.fit_head(features, l2=1.0)
    images = features.paths("train")[:4]
    before = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.h5")}
    plain = np.array([one.values for one in ep.predict(fitted, images).predictions])
    averaged = np.array([one.values for one in ep.predict(fitted, images, views=3).predictions])
    sample = {features.manifest.display_name(s): s for s in features.samples("train")}
    rows = [features.views()[k].read(tuple(sample[image] for image in images)) for k in range(3)]
    expected = np.mean([plain, *(fitted.head.predict_proba(row) for row in rows)], axis=0)
    np.testing.assert_allclose(averaged, expected, atol=1e-5)
    assert np.abs(averaged - plain).max() > 1e-3
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.h5")} == before
    with pytest.raises(UsageError, match="--views is -1, expected 0 or more"):
        ep.predict(fitted, images, views=-1)
    assert run("predict", fitted.folder, *images, "--views", 2).code == 0

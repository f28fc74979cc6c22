"""Several layers earn their place on val, the last one wins ties, and test plays no part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedpipe as ep
from embedpipe.cache import Cache
from embedpipe.classifier import Classifier, Reference
from embedpipe.errors import UsageError
from embedpipe.features import open_features
from embedpipe.heads import L2Path, fit_path
from embedpipe.selection import is_beyond_noise, paired_difference
from tests.conftest import TINY, Run, write_photos

LAYERS = ("layer1", "layer3", "penultimate")


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.FeatureSet:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    return ep.extract("photos", "timm:test_resnet", weights="none", layer=("all", "penultimate"))


def write_textures(folder: Path) -> Path:
    """Write four classes of pixel patterns under coarse noise: earlier layers see them, the last one hardly does."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    patterns = [(x + y) % 2, x % 2, y % 2, (x // 2 + y // 2) % 2]
    for split, count in (("train", 20), ("val", 24), ("test", 4)):
        for number, pattern in enumerate(patterns):
            (folder / split / f"pattern{number}").mkdir(parents=True)
            for k in range(count):
                noise = rng.integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
                image = np.clip(noise + 14 * (2 * pattern[..., None] - 1), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / f"pattern{number}" / f"{k}.png")
    return folder


def answers(right: list[int], confidence: float = 0.9) -> L2Path:
    """Return a path whose held-out answers of two classes are right or wrong, all with the same confidence."""
    correct = np.array(right, dtype=bool)
    return L2Path(None, 1.0, (), -np.log(np.where(correct, confidence, 1 - confidence)), correct)  # type: ignore[arg-type]


def test_a_lower_log_loss_must_exceed_its_noise() -> None:
    base = [1] * 90 + [0] * 10
    assert not is_beyond_noise(answers(base), answers(base))
    assert is_beyond_noise(answers(base, 0.9), answers(base, 0.6))  # not one more is correct, and all are more certain
    assert is_beyond_noise(answers([1] * 94 + [0] * 6), answers(base))
    noisy = [0] * 8 + [1] * 82 + [1] * 10  # ten gained, eight lost
    assert not is_beyond_noise(answers(noisy), answers(base))
    assert not is_beyond_noise(answers([1] * 100, 0.9999), answers([1] * 100, 0.999))  # significant and negligible


def test_a_gain_of_accuracy_must_exceed_its_noise() -> None:
    base = [1] * 90 + [0] * 10

    def gains(right: list[int], confidence: float = 0.6) -> bool:
        return is_beyond_noise(answers(right, confidence), answers(base, 0.6), "accuracy")

    assert not gains(base)
    assert not gains(base, 0.9)
    assert not gains([1] * 91 + [0] * 9)
    assert gains([1] * 94 + [0] * 6)
    assert not gains([0] * 8 + [1] * 82 + [1] * 10)


def test_the_difference_is_paired() -> None:
    right = np.array([True] * 90 + [False] * 10)
    difference, (low, high) = paired_difference(right, ~right)
    assert (difference, low < 0.8 < high) == (pytest.approx(0.8), True)
    assert paired_difference(right, right) == (0, [0, 0])


def test_spaces_stand_side_by_side_in_the_order_of_the_model(features: ep.FeatureSet) -> None:
    both = open_features(Cache(Path("cache")), layer=("penultimate", "layer1"))
    assert [space.spec["layer"] for space in both.spaces] == ["layer1", "penultimate"]
    alone = [both.only([space]) for space in both.spaces]
    assert both.feature_dim == sum(both.widths) == sum(one.feature_dim for one in alone)
    X, y = both.arrays("train")
    np.testing.assert_array_equal(X, np.hstack([one.arrays("train")[0] for one in alone]))
    np.testing.assert_array_equal(y, alone[0].arrays("train")[1])
    every = [space.spec["layer"] for space in open_features(Cache(Path("cache")), layer="all").spaces]
    stages = [layer.name for layer in ep.load_backbone("timm:test_resnet", weights="none").layers]
    assert every == [*stages, "penultimate"]


def test_images_without_a_layer_are_refused_with_the_command_that_computes_them(run: Run, photos: Path) -> None:
    write_photos(Path("few"), per_class=6)
    assert run("extract", "few", *TINY, "--layer", "layer1", "--layer", "layer2", "--image-size", 64).code == 0
    write_photos(Path("few"), per_class=8)
    assert run("extract", "few", *TINY, "--layer", "layer1", "--image-size", 64).code == 0
    ended = run("fit-head", "--layer", "layer1", "--layer", "layer2")
    assert ended.code == 2
    assert "6 of 24 images of few have no features of the layer layer2" in ended.line
    hint = "embedpipe extract few --backbone timm:test_resnet --image-size 64 --layer layer2 --weights none"
    assert f"run `{hint}`" in ended.line
    assert run(*hint.split()[1:], "--json").data["computed"] == 6
    assert run("fit-head", "--layer", "layer1", "--layer", "layer2").code == 0
    assert "24 of 24" in run("fit-head", "--layer", "layer1", "--layer", "layer9").line


def test_several_layers_predict_alike_with_and_without_a_cache(features: ep.FeatureSet) -> None:
    """What the classifier computes for new images, one pass for all layers, is what the cache holds."""
    some = open_features(Cache(Path("cache")), layer=LAYERS)
    X, y = some.arrays()
    head = fit_path(X, y, X, y, classes=some.classes, widths=some.widths, l2=0.1).head
    classifier = Classifier(head, Reference.of(some.spaces))
    backbones = classifier.backbones
    assert len({id(one.module.model) for one in backbones}) == 1
    paths = some.paths()
    np.testing.assert_allclose(classifier.predict_proba(paths), head.predict_proba(X), atol=1e-5)
    cached = ep.predict(classifier, paths)
    np.testing.assert_array_equal([one.values for one in cached.predictions], head.predict_proba(X))
    Cache(Path("cache")).remove_space(some.spaces[1].folder.name)  # the others are read, this one is computed
    partly = ep.predict(classifier, paths)
    np.testing.assert_allclose([one.values for one in partly.predictions], head.predict_proba(X), atol=1e-5)
    again = Reference.from_dict(classifier.reference.to_dict())
    assert again.to_dict() == classifier.reference.to_dict()
    assert len(again.parts) == 3


def test_a_run_on_several_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    textures = write_textures(tmp_path / "textures")
    ep.extract(textures, "timm:test_resnet", weights="none", layer=("layer1", "penultimate"), image_size=64)
    fitted = ep.fit_head(layer="all")
    assert fitted.report["decision"]["chosen"] in ("single", "blocks")
    assert fitted.report["decision"]["loss_difference"] < 0
    assert fitted.folder is not None
    blocks, decision = fitted.report["blocks"], fitted.report["decision"]
    used = [block for block in blocks if block["chosen"]]
    assert [block["layer"] for block in used] == decision[decision["chosen"]]["layers"]
    assert sum(block["dim"] for block in used) == fitted.head.feature_dim
    loaded = ep.Classifier.load(fitted.folder)
    assert len(loaded.reference.parts) == len(used)
    assert ep.evaluate(loaded).metrics == fitted.report["metrics"]["test"]
    new = [str(path) for path in sorted(textures.rglob("3.png"))]
    np.testing.assert_allclose(loaded.predict_proba(new), fitted.predict_proba(new), atol=1e-6)
    with pytest.raises(UsageError, match="expected the penultimate features alone"):
        ep.finetune(loaded, unfreeze="layer4")
    with pytest.raises(UsageError, match="no run of fit-head that fits"):
        ep.finetune(unfreeze="layer4")


def test_where_the_last_layer_wins_the_run_is_an_ordinary_one(features: ep.FeatureSet) -> None:
    from embedpipe.runs import read_run

    one, plain = ep.fit_head(layer=("layer1", "penultimate")), ep.fit_head(layer="penultimate")
    assert one.folder is not None
    assert plain.folder is not None
    assert read_run(one.folder)["reference"] == read_run(plain.folder)["reference"]
    assert set(read_run(one.folder)["reference"]) == {"spec", "loader"}
    np.testing.assert_array_equal(one.head.weight, plain.head.weight)
    assert one.report["decision"]["chosen"] == "last"


def test_layers_are_ranked_on_val(features: ep.FeatureSet) -> None:
    fitted = ep.fit_head(compare_layers=True)
    table = fitted.report["ranking"]
    losses = [row["val_log_loss"] for row in table]
    assert losses == sorted(losses)
    assert [row["chosen"] for row in table] == [True] + [False] * (len(table) - 1)
    assert {row["layer"] for row in table} >= {"layer1", "layer4", "penultimate"}
    best = table[0]
    assert fitted.reference.spec["layer"] == best["layer"]
    alone = ep.fit_head(space=best["space"])
    assert alone.report["l2"] == best["l2"]
    some = ep.fit_head(compare_layers=True, layer=("layer1", "layer2")).report["ranking"]
    assert {row["layer"] for row in some} == {"layer1", "layer2"}


def test_two_backbones(features: ep.FeatureSet) -> None:
    ep.extract("photos", ("timm:test_vit", "timm:test_resnet"), weights="none", layer=("all", "penultimate"))
    every = [
        space.spec["layer"] for space in open_features(Cache(Path("cache")), backbone="test_vit", layer="all").spaces
    ]
    stages = [layer.name for layer in ep.load_backbone("timm:test_vit", weights="none").layers]
    assert every == [*stages, "penultimate"] != sorted(every)
    both = open_features(Cache(Path("cache")), backbone=("timm:test_vit", "test_resnet"))
    assert [space.spec["architecture"] for space in both.spaces] == ["test_vit", "test_resnet"]
    fitted = ep.fit_head(both)
    assert len(fitted.report["blocks"]) == 2
    X, y = both.arrays()
    head = fit_path(X, y, X, y, classes=both.classes, widths=both.widths, l2=0.1).head
    with pytest.raises(UsageError, match="expected the penultimate features alone"):  # both penultimate, and yet two
        ep.finetune(Classifier(head, Reference.of(both.spaces)), unfreeze="layer4")


def test_what_cannot_be_chosen(features: ep.FeatureSet) -> None:
    with pytest.raises(UsageError, match="knn uses one space"):
        ep.fit_head(layer="all", solver="knn")
    manifest = features.manifest
    samples = tuple(replace(s, split="train" if s.split == "val" else s.split) for s in manifest.samples)
    both = open_features(Cache(Path("cache")), layer="all")
    with pytest.raises(UsageError, match="no validation samples to select layers on"):
        ep.fit_head(replace(both, manifest=replace(manifest, samples=samples)), l2=0.1)


def test_the_command_line_tells_of_the_choice(run: Run, photos: Path) -> None:
    assert run("extract", photos, *TINY, "--layer", "layer1", "--layer", "penultimate").code == 0
    shown = run("fit-head", "--layer", "all").out
    assert "log loss held out: " in shown
    assert "layer1" in shown
    assert "chosen" in run("fit-head", "--compare-layers").out

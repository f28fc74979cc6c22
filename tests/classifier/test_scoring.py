"""What a run says of its predictions: tables, calibration, and which split chose the head."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import embedpipe as ep
from embedpipe.classifier import Scored, answer, read_predictions, report_scores, worst_classes
from embedpipe.data import Sample
from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.evaluation import fit_temperature, log_loss, losses, scale_temperature
from embedpipe.heads import LinearHead
from tests.conftest import COLOURS, TINY, Run, write_photo, write_photos


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.FeatureSet:
    """Three classes, a quarter of the labels wrong: no head is right everywhere."""
    monkeypatch.chdir(tmp_path)
    return ep.extract(noisy_photos(Path("data")), ep.load_backbone("timm:test_resnet", weights="none"))


def noisy_photos(folder: Path) -> Path:
    seed, names = 0, sorted(COLOURS)
    for split, count in (("train", 12), ("val", 16), ("test", 16)):
        for c, name in enumerate(names):
            for k in range(count):
                seed += 1
                shown = names[(c + 1) % 3] if k % 4 == 0 else name
                write_photo(folder / split / name / f"{k:03d}.png", COLOURS[shown], seed)
    return folder


def rows_of(classifier: ep.Classifier, name: str) -> list[dict[str, str]]:
    assert classifier.folder is not None
    return list(csv.DictReader((classifier.folder / name).read_text().splitlines()))


def test_the_tables_of_a_run(features: ep.FeatureSet) -> None:
    done = ep.fit_head(features, l2=0.1)
    assert done.folder is not None
    X, y = features.arrays("test")
    p = done.head.predict_proba(X)
    best = p.argmax(axis=1)
    predictions = [one for one in read_predictions(done.folder) if one.split == "test"]
    assert [one.path for one in predictions] == features.paths("test")
    assert [one.key for one in predictions] == [s.key.hex() for s in features.samples("test")]
    assert [one.probability_of_label for one in predictions] == pytest.approx(p[np.arange(len(y)), y], rel=1e-8)
    assert list(rows_of(done, "predictions.csv")[0]) == [
        "path", "split", "label", "predicted", "probability", "key", "probability_of_label",
    ]  # fmt: skip
    for c, name in enumerate(done.classes):
        [row] = [r for r in rows_of(done, "per_class.csv") if (r["split"], r["class"]) == ("test", name)]
        assert int(row["n"]) == (y == c).sum() == 16
        assert float(row["recall"]) == pytest.approx(np.mean(best[y == c] == c))
        assert float(row["precision"]) == pytest.approx(np.mean(y[best == c] == c))
        assert float(row["recall_low"]) < float(row["recall"]) < float(row["recall_high"])
    confusion = [[int(row[name]) for name in done.classes] for row in rows_of(done, "confusion-test.csv")]
    assert confusion == [[int(((y == i) & (best == j)).sum()) for j in range(3)] for i in range(3)]
    assert {path.name for path in done.folder.glob("confusion-*")} == {
        f"confusion-{split}.csv" for split in ("train", "val", "test")
    }
    worst = done.report["worst_classes"]
    assert worst["split"] == "test"
    f1 = [one["f1"] for one in worst["classes"]]
    assert f1 == sorted(f1)
    assert len(f1) == 3


def test_the_worst_classes_are_among_those_that_occur() -> None:
    samples = tuple(Sample(f"{k}", label, "test", None, bytes(32)) for k, label in enumerate("aabbcccdd"))
    predicted = [0, 0, 1, 2, 2, 2, 3, 4, 4]  # d is called e, which has no sample
    scored = Scored(samples, np.eye(5)[predicted])
    assert [(row["class"], row["f1"]) for row in worst_classes(scored, "abcde")] == [
        ("d", 0), ("b", pytest.approx(2 / 3)), ("c", pytest.approx(2 / 3)),
    ]  # fmt: skip
    assert report_scores({"test": scored}, "abcde")["worst_classes"]["split"] == "test"
    two = Scored(samples[:4], np.eye(2)[[0, 0, 1, 1]])
    assert report_scores({"test": two}, "ab")["worst_classes"] is None


def test_the_temperature_sees_val_alone(features: ep.FeatureSet) -> None:
    done = ep.fit_head(features, l2=1e-5)
    block = done.report["calibration"]
    (X, y), (X_test, y_test) = features.arrays("val"), features.arrays("test")
    p, p_test = done.head.predict_proba(X), done.head.predict_proba(X_test)
    assert block["temperature"] == pytest.approx(fit_temperature(p, y))
    assert block["temperature"] > 1.5  # l2 is far too small for wrong labels
    assert (block["fitted_on"], block["applied"], block["at_bound"]) == ("val", False, False)
    gaps = block["splits"]["test"]
    assert gaps["before"]["log_loss"] == pytest.approx(done.report["metrics"]["test"]["log_loss"])
    assert gaps["after"]["log_loss"] == pytest.approx(log_loss(scale_temperature(p_test, block["temperature"]), y_test))
    assert gaps["after"]["log_loss"] < gaps["before"]["log_loss"]
    bins = block["reliability"]["test"]
    assert sum(one["n"] for one in bins["before"]) == sum(one["n"] for one in bins["after"]) == len(y_test)


def test_a_calibrated_head_is_what_is_scored(features: ep.FeatureSet) -> None:
    plain, done = (ep.fit_head(features, l2=1e-5, calibrate=calibrate) for calibrate in (False, True))
    temperature = plain.report["calibration"]["temperature"]
    assert isinstance(done.head, LinearHead)
    assert done.head.provenance["temperature"] == pytest.approx(temperature)
    X, y = features.arrays("test")
    np.testing.assert_allclose(done.head.logits(X) * temperature, plain.head.logits(X), rtol=1e-4, atol=1e-4)
    assert np.array_equal(done.head.logits(X).argmax(axis=1), plain.head.logits(X).argmax(axis=1))
    block = done.report["calibration"]
    assert block["applied"]
    assert (plain.report["chosen_on"], done.report["chosen_on"]) == (None, "val")
    wanted = plain.report["calibration"]["splits"]["test"]
    for when in ("before", "after"):
        assert block["splits"]["test"][when] == pytest.approx(wanted[when], abs=1e-4)
    assert done.report["metrics"]["test"]["log_loss"] == pytest.approx(block["splits"]["test"]["after"]["log_loss"])
    assert done.folder is not None
    again = ep.Classifier.load(done.folder)
    assert log_loss(again.head.predict_proba(X), y) == pytest.approx(done.report["metrics"]["test"]["log_loss"])
    assert ep.evaluate(again).metrics == done.report["metrics"]["test"]


def test_what_cannot_be_calibrated(features: ep.FeatureSet, photos: Path) -> None:
    with pytest.raises(UsageError, match="a knn head cannot be calibrated"):
        ep.fit_head(features, solver="knn", calibrate=True)
    with pytest.raises(UsageError, match="got a val that the head was fitted on"):
        ep.fit_head(features, refit=True, calibrate=True)
    assert ep.fit_head(features, refit=True).report["calibration"] is None
    easy = ep.extract(photos, features.backbone)
    with pytest.warns(EmbedpipeWarning, match="no temperature within the bounds lowers the log loss on val"):
        done = ep.fit_head(easy, l2=0.1, calibrate=True)
    assert "temperature" not in done.head.provenance


def test_without_val_there_is_no_temperature(features: ep.FeatureSet) -> None:
    lines = [f"{p},{Path(p).parent.name},{split}\n" for split in ("train", "test") for p in features.paths(split)]
    Path("list.csv").write_text("path,label,split\n" + "".join(lines))
    data = ep.extract("list.csv", features.backbone, val_fraction=0.0)
    assert set(data.splits) == {"train", "test"}
    assert ep.fit_head(data, l2=0.1).report["calibration"] is None
    with pytest.raises(UsageError, match="got only train, test"):
        ep.fit_head(data, l2=0.1, calibrate=True)


def test_what_val_has_chosen_is_said(run: Run, tmp_path: Path) -> None:
    run("extract", noisy_photos(tmp_path / "data"), *TINY)
    chosen, given = run("fit-head", "--json").data, run("fit-head", "--l2", 0.1, "--json").data
    assert (chosen["chosen_on"], given["chosen_on"]) == ("val", None)
    text, plain = run("fit-head").out, run("fit-head", "--l2", 0.1).out
    assert "\nval* " in text
    assert "* val was used to make this head" in text
    assert "*" not in plain
    assert "\nworst classes" in plain
    marked = run("evaluate", chosen["run"], "--split", "val")
    assert "val*" in marked.out
    assert "*" not in run("evaluate", chosen["run"], "--split", "test").out
    own = {
        split: run("evaluate", chosen["run"], "--split", split, "--json").data["chosen_on"] for split in ("val", "test")
    }
    assert own == {"val": "val", "test": None}
    assert run("evaluate", chosen["run"], tmp_path / "data" / "test", "--json").data["chosen_on"] is None
    refitted = run("fit-head", "--l2", 0.1, "--refit", "--json").data
    assert refitted["chosen_on"] == "val"
    tuned = run("finetune", chosen["run"], "--unfreeze", "none", "--epochs", 1, "--json").data
    assert tuned["chosen_on"] == "val"


def test_a_number_is_told_with_all_its_digits() -> None:
    for value in (1.7e12 + 3, 0.1, 1e-300):
        assert float(answer(np.array([value]), ("target",), "regression")[0]) == value


def test_the_loss_of_certain_answers_is_no_less_than_nothing() -> None:
    assert not np.signbit(losses(np.eye(2), np.arange(2))).any()


def test_a_layer_that_is_not_cached_is_told_with_the_whole_command(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    line = run("fit-head", "--layer", "layer3").line
    assert f"embedpipe extract {photos} --backbone timm:test_resnet --layer layer3 --weights none" in line


def test_a_train_split_without_images_is_told(run: Run, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", classes=("red",))
    rows = [f"{path},{k},val" for k, path in enumerate(sorted(photos.rglob("*.png")))]
    Path("t.csv").write_text("\n".join(["path,target,split", *rows]))
    run("extract", "t.csv", *TINY, "--allow-outside")
    assert "the train split of t has no images" in run("fit-head").line

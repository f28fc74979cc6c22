"""evaluate: which images are scored, and which data cannot be."""

from __future__ import annotations

import csv
import shutil
import warnings
from pathlib import Path

import pytest

import embedpipe as ep
from embedpipe.commands.evaluate import _list_classes
from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, UsageError
from tests.conftest import write_photo, write_photos


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path) -> ep.Classifier:
    monkeypatch.chdir(tmp_path)
    return ep.fit_head(ep.extract("photos", ep.load_backbone("timm:test_resnet", weights="none")))


def test_its_own_data_are_scored_on_test_and_others_whole(head: ep.Classifier) -> None:
    own = ep.evaluate(head)
    assert (own.split, own.metrics["n"]) == ("test", head.report["metrics"]["test"]["n"])
    assert own.metrics == head.report["metrics"]["test"]
    write_photos(Path("others"), per_class=3, seed=1)
    other = ep.evaluate(head, "others")
    assert (other.split, other.metrics["n"], int(other.confusion.sum())) == ("all", 9, 9)
    assert ep.evaluate(head, split="train").metrics == head.report["metrics"]["train"]


def test_images_that_the_head_was_fitted_on_are_told(head: ep.Classifier) -> None:
    with pytest.warns(EmbedpipeWarning, match=r"\d+ of \d+ images are in train or val of .*do not estimate"):
        ep.evaluate(head, "photos")
    write_photos(Path("others"), per_class=3, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ep.evaluate(head, "others")
        ep.evaluate(head)
        with (head.folder / "predictions.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
        for row in rows:
            copy = Path("apart") / row["label"] / Path(row["path"]).name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(row["path"], copy)
        assert ep.evaluate(head, "apart").metrics["n"] == len(rows) > 0


def test_rows_of_the_confusion_matrix_are_true_classes(head: ep.Classifier) -> None:
    for k in range(4):  # red images that somebody calls blue
        write_photo(Path("others") / "blue" / f"{k}.png", (210, 50, 40), seed=k)
    done = ep.evaluate(head, "others")
    assert done.classes == ("blue", "green", "red")
    assert done.confusion.sum(axis=1).tolist() == [4, 0, 0]
    predicted = ep.predict(head, "others").predictions
    assert done.confusion[0].tolist() == [sum(p.label == name for p in predicted) for name in done.classes]
    assert done.confusion_csv().splitlines()[1] == "blue," + ",".join(map(str, done.confusion[0]))


def test_what_cannot_be_scored(head: ep.Classifier) -> None:
    write_photos(Path("strange"), per_class=2, classes=("red",))
    (Path("strange") / "red").rename("strange/violet")
    with pytest.raises(UsageError, match="has the class 'violet', expected blue, green, red"):
        ep.evaluate(head, "strange")
    with pytest.raises(UsageError, match="no labelled images in the split all"):
        ep.evaluate(head, "photos/red")
    write_photos(Path("torn"), per_class=2, seed=1)
    Path("torn/red/000.png").write_bytes(b"torn")
    assert [failure.stage for failure in ep.evaluate(head, "torn").failed] == ["decode"]
    with pytest.raises(EmbedpipeError, match=r"torn/red/000\.png: not an image"):
        ep.evaluate(head, "torn", strict=True)
    with pytest.raises(UsageError, match=r"got the path 'photos/red/000\.png', expected a list of paths"):
        head.predict_proba("photos/red/000.png")


def test_classes_that_are_not_named_are_counted() -> None:
    assert _list_classes("abc") == "a, b, c"
    assert _list_classes("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"

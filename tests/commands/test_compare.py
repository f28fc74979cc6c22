"""compare: which samples two runs have in common, what differs between them, and what cannot be compared."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

import embedpipe as ep
from embedpipe.errors import EmbedpipeWarning, ModelMismatch, UsageError
from tests.conftest import TINY, Run, write_photos


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.FeatureSet:
    monkeypatch.chdir(tmp_path)
    for k, (split, count) in enumerate((("train", 8), ("val", 4), ("test", 10))):
        write_photos(Path("data") / split, per_class=count, seed=k)
    return ep.extract("data", ep.load_backbone("timm:test_resnet", weights="none"))


def rewrite(classifier: ep.Classifier, answer: dict[int, str]) -> None:
    """Let a run answer otherwise on some lines of test."""
    assert classifier.folder is not None
    path = classifier.folder / "predictions.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for k, row in enumerate([row for row in rows if row["split"] == "test"]):
        row["predicted"] = answer.get(k, row["label"])
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_what_only_one_run_has_right_is_counted(features: ep.FeatureSet) -> None:
    first, other, third = (ep.fit_head(features, l2=l2) for l2 in (0.1, 1.0, 10.0))
    rewrite(first, {0: "red", 1: "red", 2: "red", 3: "red", 4: "red"})  # lines 0 to 9 are blue
    rewrite(other, {0: "green", 29: "blue"})
    done = ep.compare([first, other, third])
    assert (done.split, done.n, done.matched_by) == ("test", 30, "content")
    assert [one.accuracy for one in done.runs[:2]] == [25 / 30, 28 / 30]
    pair = done.pairs[0]
    assert (pair.run, pair.other, pair.b, pair.c) == (first.name, other.name, 1, 4)
    assert pair.difference == pytest.approx(3 / 30)
    assert pair.p_value == pytest.approx(binomtest(1, 5).pvalue)
    assert pair.difference_ci95[0] < 0 < pair.difference_ci95[1]
    losses = [one.report["metrics"]["test"]["log_loss"] for one in (first, third)]
    assert [done.runs[0].log_loss, done.runs[2].log_loss] == pytest.approx(losses, rel=1e-6)
    assert done.pairs[1].log_loss_difference == pytest.approx(losses[1] - losses[0], rel=1e-6)
    low, high = done.pairs[1].log_loss_difference_ci95 or (0, 0)
    assert low < losses[1] - losses[0] < high
    assert len(done.pairs) == 2


def test_a_run_equals_itself(features: ep.FeatureSet) -> None:
    one = ep.fit_head(features, l2=0.1)
    pair = ep.compare([one, one]).pairs[0]
    assert (pair.difference, pair.b, pair.c, pair.p_value, pair.log_loss_difference) == (0, 0, 0, 1, 0)


def test_images_that_were_moved_and_other_orders_of_classes(features: ep.FeatureSet) -> None:
    first = ep.fit_head(features, l2=0.1)
    Path("data").rename("moved")
    shutil.rmtree("moved/test/red")  # 20 of 30 are left
    second = ep.fit_head(ep.extract("moved", features.backbone), l2=0.1)
    assert second.folder is not None
    record = second.folder / "run.json"
    blue_first = '"classes": [\n      "blue",\n      "green",\n      "red"\n    ]'
    assert blue_first in record.read_text()
    record.write_text(record.read_text().replace(blue_first, '"classes": ["red", "green", "blue"]'))
    with pytest.warns(EmbedpipeWarning, match="20 of 30 images of test are in all runs"):
        done = ep.compare([first.folder, second.folder])
    assert (done.n, done.matched_by) == (20, "content")
    assert [one.n_split for one in done.runs] == [30, 20]


def test_relabelled_images_are_not_the_same_sample(features: ep.FeatureSet) -> None:
    first = ep.fit_head(features, l2=0.1)
    Path("data/test/red/000.png").rename("data/test/blue/red.png")
    second = ep.fit_head(ep.extract("data", features.backbone), l2=0.1)
    with pytest.warns(EmbedpipeWarning, match="29 of 30"):
        assert ep.compare([first, second]).n == 29


def test_copies_count_as_often_as_they_are_there(features: ep.FeatureSet) -> None:
    first = ep.fit_head(features, l2=0.1)
    for name in ("one", "two"):
        shutil.copy("data/test/red/000.png", f"data/test/red/{name}.png")
    copies = ep.fit_head(ep.extract("data", features.backbone), l2=0.1)
    with pytest.warns(EmbedpipeWarning, match="30 of 32"):
        assert ep.compare([first, copies]).n == 30
    assert ep.compare([copies, copies]).n == 32


def test_old_runs_are_matched_by_path(features: ep.FeatureSet) -> None:
    first, other = (ep.fit_head(features, l2=l2) for l2 in (0.1, 1.0))
    assert first.folder is not None
    path = first.folder / "predictions.csv"
    path.write_text("".join(",".join(line.split(",")[:5]) + "\n" for line in path.read_text().splitlines()))
    done = ep.compare([first, other])
    assert (done.n, done.matched_by) == (30, "path")
    assert (done.runs[0].log_loss, done.pairs[0].log_loss_difference) == (None, None)
    assert done.runs[1].log_loss is not None


def test_val_is_taken_with_a_word_about_it(features: ep.FeatureSet) -> None:
    shutil.rmtree("data/test")
    data = ep.extract("data", features.backbone)
    runs = [ep.fit_head(data), ep.fit_head(data, l2=1.0)]
    with pytest.warns(EmbedpipeWarning, match="has no test split; the runs are compared on val"):
        done = ep.compare(runs)
    assert (done.split, done.n, done.chosen_on) == ("val", 12, (runs[0].name,))
    with pytest.raises(UsageError, match="no common sample in test, by content and label"):
        ep.compare(runs, split="test")


def test_what_cannot_be_compared(features: ep.FeatureSet) -> None:
    first = ep.fit_head(features, l2=0.1)
    with pytest.raises(UsageError, match="got 1 run, expected at least 2"):
        ep.compare([first])
    shutil.rmtree("data/train/red")
    for split in ("val", "test"):
        shutil.rmtree(f"data/{split}/red")
    two = ep.fit_head(ep.extract("data", features.backbone), l2=0.1)
    with pytest.raises(UsageError, match="has the class 'red'"):
        ep.compare([first, two])
    write_photos(Path("others"), per_class=20)
    for path in Path("others").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"other")
    strange = ep.fit_head(ep.extract("others", features.backbone), l2=0.1)
    with pytest.raises(UsageError, match="no common sample in test"):
        ep.compare([first, strange])
    assert first.folder is not None
    for damage in (b"\xff\x00", b"", b"path,split\na,test\n", b"path,split,label,predicted\na,test\n"):
        (first.folder / "predictions.csv").write_bytes(damage)
        with pytest.raises((ModelMismatch, UsageError)):
            ep.compare([first, first])
    (first.folder / "predictions.csv").unlink()
    with pytest.raises(ModelMismatch, match="is not readable"):
        ep.compare([first, first])


def test_how_far_fine_tuning_moved_the_features(features: ep.FeatureSet) -> None:
    head = ep.fit_head(features, l2=0.1)
    tuned = ep.finetune(head, unfreeze="layer4", epochs=1, batch_size=8, lr=1e-2)
    assert ep.compare([head, tuned]).pairs[0].cka is None  # the tuned features are not cached yet
    assert tuned.folder is not None
    again = ep.extract("data", str(tuned.folder / "model"))
    found = ep.compare([head, tuned]).pairs[0].cka
    X, Y = (one.arrays("test")[0].astype(np.float64) for one in (features, again))
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    gram, other = X @ X.T, Y @ Y.T
    assert found == pytest.approx((gram * other).sum() / np.linalg.norm(gram) / np.linalg.norm(other), rel=1e-6)
    assert found < 0.9999
    assert ep.compare([head, head]).pairs[0].cka == pytest.approx(1.0)


def test_the_command(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    names = [run("fit-head", "--l2", l2, "--json").data["run"] for l2 in (0.1, 1.0)]
    found = run("compare", *names, "--json").data
    assert set(found) == {"split", "n", "matched_by", "runs", "pairs", "chosen_on"}
    assert set(found["pairs"][0]) >= {"run", "other", "difference", "difference_ci95", "b", "c", "p_value"}
    text = run("compare", *names).out
    assert all(name in text for name in names)
    assert f"{found['n']} images of test" in text
    assert run("compare", names[0]).code == 2
    assert run("compare", names[0], "nothing").code == 2
    assert "Example:" in run("compare", "--help").out

"""What selects l2, k and the temperature: the log loss of val, or of folds of train and val where val is small."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from embedpipe.classifier import Scored, report_scores
from embedpipe.data import Sample
from embedpipe.evaluation import losses
from embedpipe.heads import Fold, fit_knn, fit_linear, fit_path, select_knn
from embedpipe.heads.knn import KS, TEMPERATURES
from embedpipe.selection import HeadConfig
from embedpipe.selection._fold_assignment import content_groups, needs_folds
from tests.conftest import TINY, Run, write_photos

X, Y = load_digits(return_X_y=True)
X = X.astype(np.float32)
TEN = tuple("0123456789")
TRAIN, VAL, LARGE_VAL = slice(0, 150), slice(150, 180), slice(150, 400)


def test_the_search_finds_what_a_sweep_finds_with_few_fits() -> None:
    rows = X[TRAIN], Y[TRAIN], X[LARGE_VAL], Y[LARGE_VAL]
    found, sweep = fit_path(*rows, classes=TEN), fit_path(*rows, classes=TEN, select="accuracy")
    assert len(sweep.points) == 45
    assert len(found.points) < 20
    by_l2 = {point["l2"]: point["val_log_loss"] for point in sweep.points}
    assert by_l2[found.l2 or 0] <= 1.01 * min(by_l2.values())
    tried, grid = {point["l2"]: point["val_log_loss"] for point in found.points}, sorted(by_l2)
    assert set(tried) <= set(grid)
    place = grid.index(found.l2 or 0)
    assert all(tried[grid[near]] > 0.99 * tried[grid[place]] for near in (place - 1, place + 1))


def test_weights_do_not_depend_on_what_was_tried() -> None:
    found = fit_path(X[TRAIN], Y[TRAIN], X[LARGE_VAL], Y[LARGE_VAL], classes=TEN)
    alone = fit_linear(X[TRAIN], Y[TRAIN], classes=TEN, l2=found.l2 or 0)
    np.testing.assert_allclose(found.head.weight, alone.weight, atol=1e-5 * np.abs(alone.weight).max())


@pytest.mark.parametrize(("n", "n_classes", "small"), [(49, 2, True), (50, 2, False), (50, 26, True), (52, 26, False)])
def test_a_val_is_small_with_few_images_in_all_or_a_class(n: int, n_classes: int, small: bool) -> None:
    assert needs_folds(np.zeros(n), n_classes) == small


def test_a_val_of_several_labels_is_small_with_few_of_each() -> None:
    assert not needs_folds(np.ones((60, 10)), 10)
    assert needs_folds(np.eye(60)[:, :40], 40)


def test_folds_of_train_and_val_select_where_val_is_small() -> None:
    config = HeadConfig(TEN)
    path = config.select(X[TRAIN], Y[TRAIN], X[VAL], Y[VAL])
    assert path.selected_on == "folds"
    assert len(path.losses) == 180
    alone = fit_linear(X[TRAIN], Y[TRAIN], classes=TEN, l2=path.l2 or 0)
    np.testing.assert_allclose(path.head.weight, alone.weight, atol=1e-5 * np.abs(alone.weight).max())
    assert config.select(X[TRAIN], Y[TRAIN], X[LARGE_VAL], Y[LARGE_VAL]).selected_on == "val"
    assert HeadConfig(TEN, selection="accuracy").select(X[TRAIN], Y[TRAIN], X[VAL], Y[VAL]).selected_on == "val"
    assert config.select(X[TRAIN], Y[TRAIN], X[:0], Y[:0]).selected_on == "folds"


def test_groups_and_copies_are_numbered_by_content_not_by_order() -> None:
    keys = [bytes([k]) * 32 for k in (7, 3, 9, 3, 5)]
    samples = [Sample(f"{k}.jpg", "a", "train", "g" if k in (0, 4) else None, key) for k, key in enumerate(keys)]
    numbers = content_groups(samples)
    assert numbers[0] == numbers[4]
    assert numbers[1] == numbers[3]
    assert len(set(numbers.tolist())) == 3
    np.testing.assert_array_equal(content_groups(samples[::-1]), numbers[::-1])


def test_copies_stay_in_one_fold() -> None:
    """A row that is copied into a fold's training part would be recalled, and the smallest l2 would win."""
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(40, 60)).astype(np.float32), rng.integers(0, 2, 40)
    twice, y, group = np.concatenate([noise, noise]), np.concatenate([labels, labels]), np.tile(np.arange(40), 2)
    config = HeadConfig(("a", "b"))
    together = config.select(twice[:60], y[:60], twice[60:], y[60:], group=group)
    apart = config.select(twice[:60], y[:60], twice[60:], y[60:])
    assert together.losses.mean() > 0.65
    assert apart.losses.mean() < 0.5
    assert (together.l2 or 0) > (apart.l2 or 0)


def test_knn_selects_k_and_temperature_by_the_log_loss() -> None:
    fold = Fold(X[TRAIN], Y[TRAIN], X[LARGE_VAL], Y[LARGE_VAL])
    k, temperature, loss = select_knn([fold], 10)
    expected = {}
    for one in KS:
        for other in TEMPERATURES:
            head = fit_knn(X[TRAIN], Y[TRAIN], classes=TEN, k=one, temperature=other)
            expected[one, other] = losses(head.predict_proba(X[LARGE_VAL]), Y[LARGE_VAL]).mean()
    assert expected[k, temperature] == pytest.approx(min(expected.values()), rel=1e-5)
    assert loss.mean() == pytest.approx(expected[k, temperature], rel=1e-5)
    assert select_knn([fold], 10, k=5)[0] == 5
    assert select_knn([fold], 10, temperature=0.5)[1] == 0.5
    assert HeadConfig(TEN, "knn").select(X[TRAIN], Y[TRAIN], X[VAL], Y[VAL]).selected_on == "folds"


def write_table(folder: Path, labels: dict[str, list[str]]) -> Path:
    """Write images of random colour with the labels of each split, and their table."""
    write_photos(folder, per_class=40, classes=("red",))
    images = sorted((folder / "red").glob("*.png"))
    table = folder / "table.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split"])
        for split, names in labels.items():
            writer.writerows([f"red/{images.pop().name}", name, split] for name in names)
    return table


CASES = {
    "one val image a class": ({"train": ["a", "b"] * 8, "val": ["a", "b"], "test": ["a", "b"]}, "folds"),
    "no val": ({"train": ["a", "b"] * 8, "test": ["a", "b"]}, "folds"),
    "a class absent from val": ({"train": ["a", "b", "c"] * 6, "val": ["a", "b"] * 3, "test": ["c"]}, "folds"),
    "a class of val absent from train": ({"train": ["a", "b"] * 8, "val": ["a", "c"] * 3, "test": ["b"]}, "folds"),
    "two images a class": ({"train": ["a", "b"], "val": ["a", "b"], "test": ["a"]}, "folds"),
    "one image a class": ({"train": ["a", "b"], "test": ["a"]}, None),
    "one class": ({"train": ["a"] * 8, "val": ["a"] * 3, "test": ["a"]}, None),
}


@pytest.mark.parametrize("solver", ["auto", "knn"])
@pytest.mark.parametrize("case", CASES)
def test_small_splits_have_a_rule_or_an_error_in_one_line(run: Run, solver: str, case: str) -> None:
    labels, selected_on = CASES[case]
    table = write_table(Path("data"), labels)
    assert run("extract", table, *TINY, *([] if "val" in labels else ["--val-fraction", 0])).code == 0
    ended = run("fit-head", "--solver", solver, "--json")
    if selected_on is None and solver == "auto":
        assert ended.code == 2
        assert len(ended.err.strip().splitlines()) == 1
        assert "Traceback" not in ended.err
        return
    if case == "one class":
        assert ended.code == 2
        return
    assert ended.code == 0
    report = ended.data
    assert (report["selection"] or {"on": None})["on"] == selected_on
    marked = "val" if "val" in labels and selected_on else None
    assert report["chosen_on"] == marked
    assert all(np.isfinite(scores["log_loss"]) for scores in report["metrics"].values())
    shutil.rmtree("data")


def test_the_report_names_the_rule_and_how_flat_the_minimum_is(run: Run, photos: Path) -> None:
    assert run("extract", photos, *TINY).code == 0
    ended = run("fit-head", "--json")
    selection, points = ended.data["selection"], ended.data["l2_path"]
    assert (selection["by"], selection["on"]) == ("log loss", "folds")
    lowest = min(point["val_log_loss"] for point in points)
    near = [point["l2"] for point in points if point["val_log_loss"] <= 1.01 * lowest]
    assert selection["nearly_as_good"] == [min(near), max(near)]
    assert "selected by log loss, " in run("fit-head").out
    swept = run("fit-head", "--select", "accuracy", "--json").data
    assert (swept["selection"]["by"], swept["selection"]["on"]) == ("accuracy", "val")
    assert len(swept["l2_path"]) == 45
    knn = run("fit-head", "--solver", "knn", "--k", 3, "--json").data
    assert knn["k"] == 3
    assert knn["temperature"] in TEMPERATURES
    assert "--k is for --solver knn" in run("fit-head", "--k", 3).line
    assert "does not use --select" in run("fit-head", "--solver", "knn", "--select", "accuracy").line


def test_a_temperature_that_does_not_lower_the_log_loss_is_not_called_fitted() -> None:
    labels = ["a"] * 3 + ["b"]
    samples = tuple(Sample(f"{k}.jpg", label, "val", None, bytes([k]) * 32) for k, label in enumerate(labels))
    calibrated, certain = (Scored(samples, np.full((4, 2), [p, 1 - p])) for p in (0.75, 0.99))
    block = report_scores({"val": calibrated}, ("a", "b"))["calibration"]
    assert (block["fitted_on"], block["temperature"]) == (None, 1)
    block = report_scores({"val": certain}, ("a", "b"))["calibration"]
    assert block["fitted_on"] == "val"
    assert block["splits"]["val"]["after"]["log_loss"] < block["splits"]["val"]["before"]["log_loss"]

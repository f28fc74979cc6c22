"""Learning curves: draws are stratified and nested, whatever else is asked for, and test chooses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.selection import HeadConfig
from embedpipe.selection._learning_curve import (
    class_sizes,
    learning_curve,
    mean_with_interval,
    parse_shots,
    rank_in_class,
)

CLASSES = ("a", "b", "c")
Y = np.repeat([0, 1, 2], [40, 20, 10])
X = (np.random.default_rng(0).normal(size=(70, 6)) + 0.7 * Y[:, None]).astype(np.float32)
CONFIG = HeadConfig(CLASSES, l2=0.01)


def curve(shots: str, **options: int) -> list[dict]:
    others = {"val": (X[::3], Y[::3]), "test": (X[1::3], Y[1::3])}
    return learning_curve(CONFIG, parse_shots(shots), (X, Y), others, **{"repeats": 4, "seed": 0, **options})


def test_what_shots_may_be() -> None:
    assert parse_shots(()) == {}
    assert parse_shots(("1, 5", 10, "25%", "100%")) == {1: 1, 5: 5, 10: 10, "25%": 0.25, "100%": 1.0}
    for wrong in ("0", "-1", "1.5", "0%", "101%", "many", "", "nan%"):
        with pytest.raises(UsageError, match="expected numbers of images per class, or percentages"):
            parse_shots(wrong)


def test_draws_are_stratified_and_nested() -> None:
    place = rank_in_class(Y, np.random.default_rng(0))
    for label, count in enumerate([40, 20, 10]):
        assert sorted(place[label == Y].tolist()) == list(range(count))
    assert place.tolist() != rank_in_class(Y, np.random.default_rng(1)).tolist()
    counts = np.array([40, 20, 10, 0, 1])
    assert class_sizes(counts, 15).tolist() == [15, 15, 10, 0, 1]
    assert class_sizes(counts, 0.1).tolist() == [4, 2, 1, 0, 1]


def test_a_point_is_the_same_whatever_else_is_asked_for() -> None:
    alone, together = curve("5"), curve("1,5,50%")
    assert together[1] == alone[0]
    assert [point["n_train"] for point in together] == [3, 15, 35]
    assert curve("5", seed=1) != alone


def test_the_mean_and_its_interval_are_those_of_the_draws() -> None:
    [point] = curve("3")
    accuracies = []
    for repeat in range(4):
        draw = rank_in_class(Y, np.random.default_rng((0, repeat))) < 3
        head = CONFIG.fit(X[draw], Y[draw], l2=0.01)
        accuracies.append(np.mean(head.predict_proba(X[1::3]).argmax(axis=1) == Y[1::3]))
    assert point["metrics"]["test"]["accuracy"] == pytest.approx(np.mean(accuracies))
    low, high = t.interval(0.95, 3, np.mean(accuracies), np.std(accuracies, ddof=1) / 2)
    assert point["metrics"]["test"]["accuracy_ci95"] == pytest.approx([max(0, low), min(1, high)])
    assert point["repeats"] == 4


def test_all_of_train_is_fitted_once() -> None:
    [point] = curve("100%")
    assert (point["n_train"], point["repeats"]) == (70, 1)
    assert point["metrics"]["val"]["accuracy_ci95"] is None
    assert mean_with_interval([0.5])["accuracy_ci95"] is None


def test_small_classes_use_all_they_have_and_it_is_said() -> None:
    with pytest.warns(EmbedpipeWarning, match=r"1 class\(es\) have fewer than 15"):
        points = curve("5,15")
    assert [point["short"] for point in points] == [[], ["c"]]
    assert points[1]["n_train"] == 40
    with pytest.raises(UsageError, match="--repeats 0"):
        curve("5", repeats=0)


def test_l2_is_chosen_on_val_alone() -> None:
    val, test = (X[::3], Y[::3]), (X[1::3], Y[1::3])
    config = HeadConfig(CLASSES)

    def chosen(**others: tuple[np.ndarray, np.ndarray]) -> list[float]:
        l2: list[float] = learning_curve(config, {4: 4}, (X, Y), others, repeats=2, seed=0)[0]["l2"]
        return l2

    draw = rank_in_class(Y, np.random.default_rng((0, 0))) < 4
    assert chosen(val=val, test=test) == chosen(val=val)
    assert chosen(val=val)[0] == config.select(X[draw], Y[draw], *val).l2

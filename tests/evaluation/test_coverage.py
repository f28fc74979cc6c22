"""95 % intervals cover the truth in 93.5 to 96.5 of 100 repeats; `pytest -s` prints the shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from embedpipe.evaluation import mean_interval, paired_interval, wilson_interval
from embedpipe.evaluation._multilabel import mean_average_precision
from embedpipe.evaluation._scores import balanced_accuracy_interval, macro_f1_interval

REPEATS = 5000
Interval = Sequence[float] | None


def check_coverage(name: str, truth: float | np.ndarray, intervals: Sequence[Interval]) -> None:
    low, high = np.array(intervals, dtype=np.float64).T
    covered = float(np.mean((low <= truth) & (truth <= high)))
    print(f"{name:<58} {100 * covered:.1f} %")
    assert 0.935 <= covered <= 0.965


@pytest.mark.parametrize("n", [200, 500, 1000, 5000])
@pytest.mark.parametrize("p", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_accuracy(n: int, p: float) -> None:
    """At one p alone coverage jumps with the lattice of counts, 0.947 to 0.967 at n = 200: p is drawn close by."""
    random = np.random.default_rng(0)
    near = random.uniform(p - 0.01, p + 0.01, REPEATS)
    drawn = random.binomial(n, near).tolist()
    intervals = {k: wilson_interval(k, n) for k in set(drawn)}
    check_coverage(f"accuracy {p}, n {n}", near, [intervals[k] for k in drawn])


def confusions(n: int, recalls: Sequence[float], shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return cell probabilities (C, C) and REPEATS confusion matrices of n samples; mistakes fall on the others alike."""
    r, w = np.array(recalls), np.array(shares) / np.sum(shares)
    cells = np.tile((1 - r)[:, None] / (len(r) - 1), (1, len(r)))
    np.fill_diagonal(cells, r)
    cells *= w[:, None]
    drawn = np.random.default_rng(0).multinomial(n, cells.ravel(), REPEATS)
    return cells, drawn.reshape(REPEATS, len(r), len(r))


CONFUSIONS = [
    (200, [0.9] * 2, [1] * 2),
    (300, [0.9] * 10, [1] * 10),
    (300, [0.95] * 10, [1] * 10),
    (300, np.linspace(0.6, 0.95, 10), np.geomspace(5, 1, 10)),
    (400, [0.9, 0.7, 0.5], [10, 3, 1]),
    (500, [0.97, 0.95, 0.92, 0.9, 0.88], [5, 4, 3, 2, 1]),
    (1000, [0.95] * 10, [1] * 10),
]


@pytest.mark.parametrize(("n", "recalls", "shares"), CONFUSIONS)
def test_means_over_classes(n: int, recalls: Sequence[float], shares: Sequence[float]) -> None:
    cells, drawn = confusions(n, recalls, shares)
    total = cells.sum(axis=0) + cells.sum(axis=1)
    f1 = float(np.mean(2 * np.diag(cells) / total))
    what = f"n {n}, C {len(recalls)}, recall {min(recalls):.2f} to {max(recalls):.2f}"
    check_coverage(
        f"balanced accuracy, {what}", float(np.mean(recalls)), [balanced_accuracy_interval(one) for one in drawn]
    )
    check_coverage(f"macro F1, {what}", f1, [macro_f1_interval(one) for one in drawn])


@pytest.mark.parametrize("n", [200, 500, 1000])
@pytest.mark.parametrize(("b", "c"), [(0.03, 0.03), (0.05, 0.02), (0.01, 0.03), (0.1, 0.1), (0.15, 0.05)])
def test_differences_of_accuracy(n: int, b: float, c: float) -> None:
    drawn = np.random.default_rng(0).multinomial(n, [b, c, 1 - b - c], REPEATS).tolist()
    check_coverage(f"difference, {b} to {c}, n {n}", c - b, [paired_interval(i, j, n) for i, j, _ in drawn])


def cross_entropies(random: np.random.Generator, n: int, sharper: float) -> np.ndarray:
    """Return losses (REPEATS, n) of two classes: many small ones and a few large."""
    margins = sharper * random.normal(1.5, 1.0, (REPEATS, n))
    return np.asarray(np.logaddexp(0, -margins))


@pytest.mark.parametrize("n", [200, 500])
@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("log loss", lambda random, n: cross_entropies(random, n, 1)),
        ("log loss, overconfident", lambda random, n: cross_entropies(random, n, 3)),
        ("difference of log loss", lambda random, n: cross_entropies(random, n, 2) - cross_entropies(random, n, 1)),
    ],
)
def test_means(name: str, draw: Callable[[np.random.Generator, int], np.ndarray], n: int) -> None:
    truth = float(np.mean(draw(np.random.default_rng(1), 1000)))
    drawn = draw(np.random.default_rng(0), n)
    check_coverage(f"{name}, n {n}", truth, [mean_interval(one) for one in drawn])


@pytest.mark.parametrize(
    ("n", "classes", "apart", "truth"), [(100, 3, 1.0, 0.815), (300, 10, 1.0, 0.829), (100, 20, 0.5, 0.562)]
)
def test_mean_average_precision(n: int, classes: int, apart: float, truth: float) -> None:
    """Of few positives and nearly perfect ranks it covers more, 97 to 100 of 100."""
    random, shares = np.random.default_rng(0), np.linspace(0.1, 0.5, classes)
    intervals = []
    for _ in range(400):
        Y = random.random((n, classes)) < shares
        logits = random.normal(size=(n, classes)) + apart * (2 * Y - 1)
        intervals.append(mean_average_precision(logits, Y)[1])
    low, high = np.array(intervals, dtype=np.float64).T
    covered = float(np.mean((low <= truth) & (truth <= high)))
    print(f"mean average precision, n {n}, C {classes:<34} {100 * covered:.1f} %")
    assert 0.915 <= covered <= 0.98

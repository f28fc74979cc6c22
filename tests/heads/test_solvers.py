"""One conformance suite for all solvers: the same optimum of the documented objective."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_wine

from embedpipe.heads import L2_GRID, LinearHead, fit_linear, fit_path
from embedpipe.heads import SOLVERS as ALL

SOLVERS = [name for name in ALL if name != "ridge"]  # those of the one objective
L2S = (1e-6, 1e-3, 1.0, 100.0)
Data = tuple[np.ndarray, np.ndarray]


def clusters(n: int, width: int, n_classes: int, *, seed: int = 0) -> Data:
    """Overlapping Gaussian classes with correlated features of very different variance."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    X = random.normal(size=(n, width)) + 0.5 * random.normal(size=(n_classes, width))[y]
    mixing = random.normal(size=(width, width)) / np.arange(1, width + 1)[:, None] ** 0.5
    return (X @ mixing).astype(np.float32), y


def spoiled(X: np.ndarray) -> np.ndarray:
    """Dead columns, duplicates, and columns scaled by 1e3."""
    X = X.copy()
    X[:, 0], X[:, 1] = 0, 7.1
    X[:, 2] = X[:, 3]
    X[:, 4:8] *= 1e3
    return X


def digits() -> Data:
    X, y = load_digits(return_X_y=True)
    return X[:400], y[:400]


DATA: dict[str, Data] = {
    "two classes, N > D": clusters(150, 40, 2),
    "two classes, N < D": clusters(50, 120, 2),
    "three classes": (load_wine().data, load_wine().target),
    "three classes, spoiled": (spoiled(clusters(150, 40, 3)[0]), clusters(150, 40, 3)[1]),
    "three classes, N < D, spoiled": (spoiled(clusters(50, 120, 3)[0]), clusters(50, 120, 3)[1]),
    "fifty classes": clusters(400, 40, 50),
    "digits": digits(),
}


def unfolded(head: LinearHead, X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights on standardised features (float64), bias and those features, written down afresh."""
    X = X.astype(np.float32).astype(np.float64)
    std = X.std(axis=0)
    std[std < 1e-9 * np.abs(X.mean(axis=0))] = 0
    std = np.maximum(std, 0.01 * np.median(std))
    weight = head.weight.astype(np.float64)
    return weight * std, head.bias + weight @ X.mean(axis=0), (X - X.mean(axis=0)) / std


def documented_objective(head: LinearHead, X: np.ndarray, y: np.ndarray, l2: float) -> float:
    weight, bias, Z = unfolded(head, X)
    logits = Z @ weight.T + bias
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    if len(weight) == 2:
        weight = weight[1:] - weight[:1]
    return float(losses.mean() + l2 / 2 * np.square(weight).sum())


def fitted(solver: str, data: Data, l2: float, **options: object) -> LinearHead:
    X, y = data
    classes = [str(c) for c in range(int(y.max()) + 1)]
    return fit_linear(X, y, classes=classes, l2=l2, solver=solver, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("l2", L2S)
@pytest.mark.parametrize("name", DATA)
def test_all_solvers_reach_the_same_objective(name: str, l2: float) -> None:
    heads = [fitted(solver, DATA[name], l2) for solver in SOLVERS]
    objectives = [documented_objective(head, *DATA[name], l2) for head in heads]
    assert objectives == pytest.approx([min(objectives)] * len(SOLVERS), rel=1e-4)
    reported = [head.provenance["objective"] for head in heads]
    assert reported == pytest.approx(objectives, rel=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["two classes, N < D", "three classes, spoiled", "fifty classes"])
def test_the_gradient_of_the_documented_objective_vanishes(solver: str, name: str) -> None:
    X, y = DATA[name]
    l2 = 1e-2
    head = fitted(solver, DATA[name], l2)
    weight, bias, Z = unfolded(head, X)
    logits = Z @ weight.T + bias
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    error = (p - np.eye(len(weight))[y]) / len(y)
    # the rows -w/2 and +w/2 of one logit: l2 w = 2 l2 (w/2)
    gradient = error.T @ Z + (2 if len(weight) == 2 else 1) * l2 * weight
    bound = np.square(gradient).sum() / (2 * l2)
    assert bound <= 1e-4 * head.provenance["objective"]
    assert np.abs(error.sum(axis=0)).max() < 1e-4  # free bias: predicted and true frequencies agree


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_classes_are_stored_as_one_logit(solver: str) -> None:
    head = fitted(solver, DATA["two classes, N > D"], 1e-2)
    assert np.array_equal(head.weight[0], -head.weight[1])
    assert head.bias[0] == -head.bias[1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["two classes, N > D", "three classes"])
def test_sample_weights_are_repetitions_whatever_their_sum(solver: str, name: str) -> None:
    X, y = DATA[name]
    X, times = (X - X.mean(axis=0)) / X.std(axis=0), np.random.default_rng(1).integers(0, 4, len(y))
    weighted = fitted(solver, (X, y), 1e-2, sample_weight=times * 7.0, standardize=False)
    repeated = fitted(solver, (X.repeat(times, 0), y.repeat(times)), 1e-2, standardize=False)
    np.testing.assert_allclose(weighted.logits(X), repeated.logits(X), atol=5e-3)
    plain = fitted(solver, (X, y), 1e-2, standardize=False)
    assert np.abs(plain.logits(X) - repeated.logits(X)).max() > 0.02


@pytest.mark.parametrize("solver", SOLVERS)
def test_features_that_are_not_centred_cost_no_accuracy_without_standardising(solver: str) -> None:
    X, y = clusters(150, 20, 3)
    near = fitted(solver, (X, y), 1e-2, standardize=False)
    far = fitted(solver, (X + 30, y), 1e-2, standardize=False)
    assert far.provenance["objective"] == pytest.approx(near.provenance["objective"], rel=1e-3)


def test_every_point_of_a_swept_path_is_an_optimum() -> None:
    X, y = DATA["digits"]
    path = fit_path(X, y, X[:50], y[:50], classes=list("0123456789"), select="accuracy")
    assert [point["l2"] for point in path.points] == list(L2_GRID)
    for point in path.points[::9]:
        reference = fitted("sklearn", DATA["digits"], point["l2"]).provenance["objective"]
        assert point["objective"] == pytest.approx(reference, rel=1e-4)


@pytest.mark.slow
def test_the_whole_path_is_cheap() -> None:
    X, y = clusters(1300, 1280, 10)
    start = time.process_time()
    fit_path(X[:1100], y[:1100], X[1100:], y[1100:], classes=list("0123456789"))
    assert time.process_time() - start < 15

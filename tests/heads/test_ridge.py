"""Solver `ridge`: scikit-learn's Ridge, and what refitting without each sample gives."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from embedpipe.heads import fit_path
from embedpipe.heads._problem import Problem
from embedpipe.heads._ridge import solve_path


def problem(n: int, width: int, n_classes: int) -> Problem:
    random = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    X = (random.normal(size=(n, width)) + random.normal(size=(n_classes, width))[y] / 2).astype(np.float32)
    weight = random.uniform(0.5, 2, n)
    return Problem(X, y, weight / weight.sum(), n_classes)


def targets(given: Problem) -> np.ndarray:
    return np.eye(given.n_classes)[given.y] if given.n_classes > 2 else 2.0 * given.y[:, None] - 1


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(80, 20, 3), (40, 60, 4), (60, 20, 2)])
def test_weights_are_those_of_least_squares_times_one_factor(shape: tuple[int, int, int], l2: float) -> None:
    given = problem(*shape)
    [weights], [bias], *_ = solve_path(given, [l2])
    reference = Ridge(alpha=l2).fit(given.X.astype(np.float64), targets(given), sample_weight=given.sample_weight)
    weight = np.atleast_2d(reference.coef_)
    factor = np.linalg.norm(weights) / np.linalg.norm(weight)
    assert factor >= 1
    np.testing.assert_allclose(weights, factor * weight, atol=1e-6 * np.abs(weights).max())
    np.testing.assert_allclose(bias, factor * reference.intercept_, atol=1e-6)


@pytest.mark.parametrize("shape", [(80, 20, 3), (40, 60, 4), (60, 20, 2)])
def test_leave_one_out_is_what_refitting_without_each_sample_gives(shape: tuple[int, int, int]) -> None:
    given = problem(*shape)
    l2s = [1.0, 1e-2]
    *_, name, accuracies = solve_path(given, l2s)
    assert name == "loo_accuracy"
    for l2, accuracy in zip(l2s, accuracies, strict=True):
        right = []
        for one in range(len(given.y)):
            rest = np.arange(len(given.y)) != one
            model = Ridge(alpha=l2).fit(given.X[rest], targets(given)[rest], sample_weight=given.sample_weight[rest])
            scores = np.ravel(model.predict(given.X[one : one + 1]))
            said = scores.argmax() if len(scores) > 1 else int(scores[0] > 0)
            right.append(said == given.y[one])
        assert accuracy == pytest.approx(given.sample_weight @ np.array(right), abs=1e-9)


def test_without_validation_leave_one_out_chooses_l2() -> None:
    given = problem(60, 80, 3)
    path = fit_path(given.X, given.y, None, None, classes=["a", "b", "c"], solver="ridge")
    best = max(point["loo_accuracy"] or 0 for point in path.points)
    chosen = next(point for point in path.points if point["l2"] == path.l2)
    assert chosen["loo_accuracy"] == best
    assert not any("val_accuracy" in point for point in path.points)
    assert len({point["loo_accuracy"] for point in path.points}) > 1

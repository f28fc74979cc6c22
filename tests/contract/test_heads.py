"""Heads of the default solver on problems from a seeded generator, against stored ones.

The objective is mean cross-entropy + l2/2 ||W||^2 on standardised features, bias free; it is computed here in float64 by NumPy.
At l2 = 1 and 1e-2 it determines the weights. The stored heads are the optima that SciPy's L-BFGS-B finds in float64 (gradient
below 2e-9); those of embedpipe 0.1.0 were within 7e-6 of them. At l2 = 1e-6 the weights are hardly determined, so only the
objective must agree, with that of heads which embedpipe 0.1.0 wrote.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from embedpipe.heads import LinearHead, fit_linear, fit_path
from tests.contract.conftest import RECORD

HEADS_FILE = Path(__file__).with_name("heads.npz")
PROBLEMS = {"2-classes": (600, 32, 2), "10-classes": (600, 32, 10), "30-classes": (600, 32, 30), "wide": (60, 128, 5)}
DETERMINED, SMALL = (1.0, 1e-2), 1e-6  # l2
WEIGHT_TOLERANCE = 1e-6  # of the largest absolute weight
OBJECTIVE_TOLERANCE = 4e-7  # relative


def make_problem(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return overlapping classes of unequal size: X (N, D) float32 of unequal scale, y (N,) int64."""
    n, dim, classes = PROBLEMS[name]
    rng = np.random.default_rng(n + dim + classes)
    y = np.sort(np.arange(n) % (classes + 1) % classes)  # class 0 has twice as many samples
    centres = rng.normal(size=(classes, dim))
    scale = np.logspace(-1, 2, dim)
    scale[0] = 1e-6  # its std is floored
    X = (centres[y] + 2 * rng.normal(size=(n, dim))) * scale + 3 * rng.normal(size=dim)
    return X.astype(np.float32), y


def names_of(classes: int) -> tuple[str, ...]:
    return tuple(f"class-{c:02d}" for c in range(classes))


def standardiser(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std (D,) float64, the std floored at 0.01 x the median std."""
    std = X.std(axis=0, dtype=np.float64)
    return X.mean(axis=0, dtype=np.float64), np.maximum(std, 0.01 * np.median(std))


def objective(X: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, l2: float) -> float:
    """Return the objective of a head on raw features; two classes are one logit, the difference of the two rows."""
    mean, std = standardiser(X)
    W = weight.astype(np.float64) * std
    b = bias.astype(np.float64) + weight.astype(np.float64) @ mean
    logits = (X - mean) / std @ W.T + b
    loss = np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(y)), y])
    penalised = W[1] - W[0] if len(W) == 2 else W
    return float(loss + l2 / 2 * np.sum(penalised**2))


def fit(name: str, l2: float) -> LinearHead:
    """Fit as fit-head does, to a path of one l2: its last steps take the weights as near the optimum as float32 allows."""
    X, y = make_problem(name)
    return fit_path(X, y, X[::10], y[::10], classes=names_of(PROBLEMS[name][2]), l2=l2).head


def stored_head(name: str, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored weight (C, D) and bias (C,); fit and store them first when references are recorded."""
    stored = dict(np.load(HEADS_FILE)) if HEADS_FILE.exists() else {}
    key = f"{name} {l2:g}"
    if RECORD and f"{key} weight" not in stored:
        head = fit(name, l2)
        stored |= {f"{key} weight": head.weight, f"{key} bias": head.bias}
        np.savez_compressed(HEADS_FILE, **stored)
    return stored[f"{key} weight"], stored[f"{key} bias"]


@pytest.mark.parametrize("l2", DETERMINED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_weights(name: str, l2: float) -> None:
    weight, bias = stored_head(name, l2)
    head = fit(name, l2)
    assert head.weight.dtype == head.bias.dtype == np.float32
    assert head.classes == names_of(PROBLEMS[name][2])
    _, std = standardiser(make_problem(name)[0])
    largest = np.abs(weight * std).max()  # compare what the solver determines: weights of standardised features
    assert np.abs((head.weight - weight) * std).max() <= WEIGHT_TOLERANCE * largest
    assert np.abs(head.weight - weight).max() <= WEIGHT_TOLERANCE * np.abs(weight).max()
    assert np.abs(head.bias - bias).max() <= WEIGHT_TOLERANCE * max(np.abs(weight).max(), np.abs(bias).max())


@pytest.mark.parametrize("l2", [*DETERMINED, SMALL])
@pytest.mark.parametrize("name", PROBLEMS)
def test_objective(name: str, l2: float) -> None:
    X, y = make_problem(name)
    head = fit(name, l2)
    expected = objective(X, y, *stored_head(name, l2), l2)
    assert objective(X, y, head.weight, head.bias, l2) == pytest.approx(expected, rel=OBJECTIVE_TOLERANCE)


@pytest.mark.parametrize("l2", [*DETERMINED, SMALL])
@pytest.mark.parametrize("name", PROBLEMS)
def test_stored_heads_are_optimal(name: str, l2: float) -> None:
    """L-BFGS in float64, started from the stored head, finds nothing lower."""
    X, y = make_problem(name)
    weight, bias = stored_head(name, l2)
    mean, std = standardiser(X)
    Z = (X - mean) / std
    b = bias + weight.astype(np.float64) @ mean
    value = objective(X, y, weight, bias, l2)

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        W, c = flat[: Z.shape[1] * len(bias)].reshape(len(bias), -1), flat[Z.shape[1] * len(bias) :]
        logits = Z @ W.T + c
        error = (softmax(logits, axis=1) - np.eye(len(bias))[y]) / len(y)
        loss = np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(y)), y])
        # rows -w/2 and +w/2 with penalty l2/2 ||w||^2 have penalty l2 (||row 0||^2 + ||row 1||^2)
        strength = 2 * l2 if len(bias) == 2 else l2
        gradient = np.concatenate([(error.T @ Z + strength * W).ravel(), error.sum(axis=0)])
        return float(loss + strength / 2 * np.sum(W**2)), gradient

    start = np.concatenate([(weight * std).ravel(), b])
    assert value_and_gradient(start)[0] == pytest.approx(value, rel=1e-12)
    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12, "maxcor": 50}
    found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    assert value - found.fun <= OBJECTIVE_TOLERANCE * found.fun


def test_the_head_of_a_path_is_the_head_of_its_l2() -> None:
    X, y = make_problem("10-classes")
    train = np.arange(len(y)) % 3 > 0
    grid = np.logspace(-6, 2, 45)
    for select in ("log-loss", "accuracy"):
        path = fit_path(X[train], y[train], X[~train], y[~train], classes=names_of(10), select=select)
        tried = [point["l2"] for point in path.points]
        assert {*tried} <= {*grid.tolist()}
        assert (len(tried) == 45) is (select == "accuracy")
        assert path.l2 in tried
        alone = fit_linear(X[train], y[train], classes=names_of(10), l2=path.l2)
        values = [objective(X[train], y[train], head.weight, head.bias, path.l2) for head in (path.head, alone)]
        assert values[0] == pytest.approx(values[1], rel=OBJECTIVE_TOLERANCE)

"""Solver `ridge`: least squares on the classes, for all l2 from one eigendecomposition, with exact leave-one-out scores.

The targets t (K,) of an image are 1 for its class and 0 for the others; for two classes and for several labels 1 and -1; numbers
stay as they are. The solver minimises over weights W (K, D) and a free bias b (K,)

    weighted mean of ||W x + b - t||^2 / 2 + l2 / 2 * ||W||^2

Let Q diag(s) Q' be the weighted covariance of the features and A (D, K) their covariance with the targets. For every l2,
W' = Q diag(1 / (s + l2)) Q' A. A sample with residual r and leverage h has the residual r / (1 - h) if it is left out of the
fit; h is its weight times (1 + z' diag(1 / (s + l2)) z), with z = Q' (x - mean). The scores become logits by one factor, which
minimises the log loss of the leave-one-out scores; numbers stay as they are.

Source: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 3.4.1 and 7.10.1 (equation 7.64).

>>> weights, biases, extra = solve_path(problem, [1e-3])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from embedpipe.heads._problem import Float32, Float64, Int64, Problem, blocks, cross_entropy, project_rows

FACTOR_SAMPLES = 5000  # at most, on which the factor is fitted
MAX_FACTOR = 1e3


def solve_path(problem: Problem, l2s: Sequence[float]) -> tuple[Float64, Float64, list[float], str, Float64]:
    """Minimise the squared error for every l2.

    Returns
    -------
    weights (L, K, D), biases (L, K), objectives (L,), and "loo_accuracy" or "loo_rmse" with its values (L,)
    """
    reduced, basis = project_rows(problem)
    mean, covariance, cross = _measure_moments(reduced)
    spectrum, Q = np.linalg.eigh(covariance)
    rotated = Q.T @ cross  # (r, K)
    shrinkage = 1 / (np.maximum(spectrum, 0)[:, None] + np.asarray(l2s))  # (r, L)
    sample = np.linspace(0, len(reduced.X) - 1, min(FACTOR_SAMPLES, len(reduced.X))).astype(np.int64)
    left_out, errors, scores = _leave_one_out(reduced, mean, Q, rotated, shrinkage, sample=sample)
    weights = np.stack([(Q @ (rotated * column[:, None])).T for column in shrinkage.T])
    objectives = (errors + np.asarray(l2s) * np.square(weights).sum(axis=(1, 2))) / 2
    factors = np.array([1.0 if reduced.numeric else _fit_factor(reduced, sample, one) for one in left_out])
    biases = factors[:, None] * (reduced.sample_weight @ _targets(reduced) - weights @ mean)
    weights = factors[:, None, None] * (weights if basis is None else weights @ basis.T)
    return weights, biases, objectives.tolist(), "loo_rmse" if reduced.numeric else "loo_accuracy", scores


def _targets(problem: Problem, rows: slice = slice(None)) -> Float64:
    """Return the targets of least squares, float64 (n, K)."""
    y = problem.y[rows]
    if problem.numeric:
        return np.asarray(y, dtype=np.float64)[:, None]
    targets = 2.0 * y.reshape(len(y), -1) - 1 if problem.independent else np.eye(problem.n_classes)[y]
    return np.asarray(targets)


def _measure_moments(problem: Problem) -> tuple[Float64, Float64, Float64]:
    """Return mean (D,), covariance (D, D) and covariance with the targets (D, K)."""
    width = problem.X.shape[1]
    mean, covariance, cross = np.zeros(width), np.zeros((width, width)), np.zeros((width, problem.n_logits))
    for rows in blocks(problem.X):
        mean += problem.sample_weight[rows] @ problem.X[rows]
    for rows in blocks(problem.X):
        root = np.sqrt(problem.sample_weight[rows, None])
        centred = (problem.X[rows] - mean) * root
        covariance += centred.T @ centred  # NumPy computes half of a product of a matrix with itself
        cross += centred.T @ (root * _targets(problem, rows))
    return mean, covariance, cross


def _leave_one_out(
    problem: Problem, mean: Float64, Q: Float64, rotated: Float64, shrinkage: Float64, *, sample: Int64
) -> tuple[Float32, Float64, Float64]:
    """Return leave-one-out scores and errors.

    Returns
    -------
    leave-one-out scores of the rows with the rising indices `sample`, float32 (L, n, K); mean squared error of all rows, float64
    (L,); and their leave-one-out accuracy, or RMSE of numbers in their unit, float64 (L,)
    """
    many = shrinkage.shape[1]
    left_out = np.empty((many, len(sample), rotated.shape[1]), dtype=np.float32)
    errors, scores = np.zeros(many), np.zeros(many)
    target_mean = problem.sample_weight @ _targets(problem)
    for rows in blocks(problem.X):
        weight, targets = problem.sample_weight[rows], _targets(problem, rows)
        in_block = slice(*np.searchsorted(sample, [rows.start, rows.stop]))
        z = (problem.X[rows] - mean) @ Q
        leverage = weight[:, None] * (1 + z**2 @ shrinkage)  # (n, L)
        for number in range(many):
            residual = targets - target_mean - z @ (rotated * shrinkage[:, number, None])
            errors[number] += weight @ (residual**2).sum(axis=1)
            without = targets - residual / np.maximum(1 - leverage[:, number], 1e-9)[:, None]
            scores[number] += weight @ _score_rows(problem, rows, without)
            left_out[number, in_block] = without[sample[in_block] - rows.start]
    return left_out, errors, problem.y_std * np.sqrt(scores) if problem.numeric else scores


def _fit_factor(problem: Problem, rows: Int64, scores: Float32) -> float:
    """Return the factor from 1 to MAX_FACTOR that minimises the log loss of scores (n, K) of the rows with these indices (n,)."""
    logits, y = scores.astype(np.float64), problem.y[rows].astype(np.int64)

    def loss(log_factor: float) -> float:
        return float(problem.sample_weight[rows] @ cross_entropy(np.exp(log_factor) * logits, y))

    return float(np.exp(minimize_scalar(loss, bounds=(0, np.log(MAX_FACTOR)), method="bounded").x))


def _score_rows(problem: Problem, rows: slice, scores: Float64) -> Float64:
    """Return whether scores (n, K) predict the class, or all labels, float64 (n,); for numbers the squared error."""
    y = problem.y[rows]
    if problem.numeric:
        return np.asarray((scores[:, 0] - y) ** 2)
    if problem.independent:
        return np.asarray(((scores > 0) == y.reshape(len(y), -1)).all(axis=1), dtype=np.float64)
    return np.asarray(scores.argmax(axis=1) == y, dtype=np.float64)

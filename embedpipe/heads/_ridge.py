"""Solver `ridge`: least squares on the classes, for every l2 from one eigendecomposition, leave-one-out for free.

Minimises, over weights W (K, D) and a free bias, with targets t of one for an image's class and zero for the others (two classes,
and labels of which an image may have several: one and minus one; numbers as they are),

    weighted mean of ||W x + b - t||^2 / 2 + l2 / 2 * ||W||^2

With the weighted covariance of the features Q diag(s) Q', W = T' Z diag(1 / (s + l2)) Q' for all l2. A sample that is left out
misses its target by r / (1 - h), r what it misses now and h its weight times (1 + z' diag(1 / (s + l2)) z). Scores become logits
by one factor, which minimises the log loss of the scores left out; numbers stay.

Source: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 3.4.1 and 7.10.1 (equation 7.64).

>>> [solution] = solve_path(problem, [1e-3])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from embedpipe.heads._problem import Float32, Float64, Int64, Moments, Problem, Solution, blocks, log_normaliser, narrow

SAMPLES = 5000  # at most, to find the factor with
LARGEST_FACTOR = 1e3


def solve_path(problem: Problem, l2s: Sequence[float], start: Solution | None = None) -> list[Solution]:
    """Minimise the squared error for every l2; a start is of no use."""
    small, basis = narrow(problem)
    moments = small.moments or _measure(small)
    spectrum, turn = np.linalg.eigh(moments.covariance)
    mean, spectrum = moments.mean, np.maximum(spectrum, 0)
    across_turned = turn.T @ moments.across  # (r, K)
    shrink = 1 / (spectrum[:, None] + np.asarray(l2s))  # (r, L)
    left_out, missed, scores = _leave_out(small, mean, turn, across_turned, shrink)
    middle = small.sample_weight @ _targets(small)
    solutions, name = [], "loo_rmse" if small.numeric else "loo_accuracy"
    for number, l2 in enumerate(l2s):
        weight = (turn @ (across_turned * shrink[:, number, None])).T
        factor = 1.0 if small.numeric else _factor(small, left_out[number])
        objective = (missed[number] + l2 * np.sum(weight**2)) / 2
        bias = factor * (middle - weight @ mean)
        weight = weight if basis is None else weight @ basis.T
        solutions.append(Solution(factor * weight, bias, float(objective), **{name: float(scores[number])}))
    return solutions


def _targets(problem: Problem, rows: slice = slice(None)) -> Float64:
    """Return what the scores should be, float64 (n, K)."""
    y = problem.y[rows]
    if problem.numeric:
        return np.asarray(y, dtype=np.float64)[:, None]
    targets = 2.0 * y.reshape(len(y), -1) - 1 if problem.apart else np.eye(problem.n_classes)[y]
    return np.asarray(targets)


def _measure(problem: Problem) -> Moments:
    width = problem.X.shape[1]
    mean, gram, across = np.zeros(width), np.zeros((width, width)), np.zeros((width, problem.rows))
    for rows in blocks(problem.X):
        mean += problem.sample_weight[rows] @ problem.X[rows]
    for rows in blocks(problem.X):
        root = np.sqrt(problem.sample_weight[rows, None])
        centred = (problem.X[rows] - mean) * root
        gram += centred.T @ centred  # a matrix with itself: half the work
        across += centred.T @ (root * _targets(problem, rows))
    return Moments(mean, gram, across)


def _leave_out(
    problem: Problem, mean: Float64, turn: Float64, across: Float64, shrink: Float64
) -> tuple[Float32, Float64, Float64]:
    """Return what SAMPLES evenly spaced rows score with themselves left out, float32 (L, n, K), and of all rows, (L,) each, the
    mean squared error with them and the score without.
    """
    many, drawn = shrink.shape[1], _drawn(problem)
    left_out = np.empty((many, len(drawn), across.shape[1]), dtype=np.float32)
    missed, scores = np.zeros(many), np.zeros(many)
    middle = problem.sample_weight @ _targets(problem)
    for rows in blocks(problem.X):
        weight, targets = problem.sample_weight[rows], _targets(problem, rows)
        places = slice(*np.searchsorted(drawn, [rows.start, rows.stop]))
        turned = (problem.X[rows] - mean) @ turn
        leverage = weight[:, None] * (1 + turned**2 @ shrink)  # (n, L)
        for number in range(many):
            rest = targets - middle - turned @ (across * shrink[:, number, None])
            missed[number] += weight @ (rest**2).sum(axis=1)
            without = targets - rest / np.maximum(1 - leverage[:, number], 1e-9)[:, None]
            scores[number] += weight @ _merits(problem, rows, without)
            left_out[number, places] = without[drawn[places] - rows.start]
    return left_out, missed, np.sqrt(scores) if problem.numeric else scores


def _drawn(problem: Problem) -> Int64:
    """Return the rows that the factor is found with, int64 (n,)."""
    return np.linspace(0, len(problem.X) - 1, min(SAMPLES, len(problem.X))).astype(np.int64)


def _factor(problem: Problem, scores: Float32) -> float:
    """Return the factor that makes scores (n, K) of the drawn rows the best logits: it minimises their log loss, from 1 to
    LARGEST_FACTOR.
    """
    some = _drawn(problem)
    logits, truth, weight = scores.astype(np.float64), problem.y[some], problem.sample_weight[some]

    def loss(log_factor: float) -> float:
        scaled = np.exp(log_factor) * logits
        if problem.apart:
            each = np.logaddexp(0, scaled * (1 - 2 * truth.reshape(scaled.shape))).sum(axis=1)
        else:
            each = log_normaliser(scaled) - scaled[np.arange(len(truth)), truth]
        return float(weight @ each)

    return float(np.exp(minimize_scalar(loss, bounds=(0, np.log(LARGEST_FACTOR)), method="bounded").x))


def _merits(problem: Problem, rows: slice, scores: Float64) -> Float64:
    """Return whether scores (n, K) name the truth, all labels of it, float64 (n,); of numbers their squared error."""
    y = problem.y[rows]
    if problem.numeric:
        return np.asarray((scores[:, 0] - y) ** 2)
    right = ((scores > 0) == y.reshape(len(y), -1)).all(axis=1) if problem.apart else scores.argmax(axis=1) == y
    return np.asarray(right, dtype=np.float64)

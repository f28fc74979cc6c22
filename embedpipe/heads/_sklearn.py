"""Solvers `lbfgs` and `sklearn`: scikit-learn's LogisticRegression, which is L-BFGS; its C is 1 / l2 as sample weights sum to 1.

>>> weight, bias, objective = make_solver(problem)([1e-3], weight, bias, tolerance=4e-7)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from sklearn.linear_model import LogisticRegression

from embedpipe.heads._problem import Float64, Optimum, Problem, Solve

GRADIENT_TOLERANCE, MAX_ITERATIONS = 1e-8, 20_000


def make_solver(problem: Problem, pool: ThreadPoolExecutor | None = None) -> Solve:
    """Return a function that minimises the objective of a problem."""
    mean = problem.sample_weight @ problem.X[:]
    X = problem.X[:] - mean  # float64; centring speeds convergence up and changes nothing else, as the bias is free
    return partial(_solve, problem, X, mean)


def _solve(
    problem: Problem, X: Float64, mean: Float64, l2s: Sequence[float], weight: Float64, bias: Float64, tolerance: float
) -> Optimum:
    """Minimise the objective for L values of l2, one after the other; the tolerance is GRADIENT_TOLERANCE."""
    weights, biases, objectives = [], [], []
    for l2, start_weight, start_bias in zip(l2s, weight, bias, strict=True):
        model = LogisticRegression(C=1 / l2, tol=GRADIENT_TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True)
        model.coef_, model.intercept_ = start_weight.copy(), start_bias + start_weight @ mean
        model.fit(X, problem.y, sample_weight=problem.sample_weight)
        weights.append(model.coef_)
        biases.append(model.intercept_ - model.coef_ @ mean)
        objectives.append(problem.objective(weights[-1], biases[-1], l2))
    return np.stack(weights), np.stack(biases), np.array(objectives)

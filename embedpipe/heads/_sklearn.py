"""Solver `sklearn`: scikit-learn's LogisticRegression, whose C is 1 / l2 if the sample weights sum to 1.

>>> weight, bias, _ = solve_path(problem, [1e-3])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from embedpipe.heads._problem import PathWeights, Problem

GRADIENT_TOLERANCE, MAX_ITERATIONS = 1e-8, 20_000


def solve_path(problem: Problem, l2s: Sequence[float]) -> PathWeights:
    """Minimise the objective for every l2, in falling order, each from the optimum before."""
    mean = problem.sample_weight @ problem.X[:]
    X = problem.X[:] - mean  # float64; centring speeds convergence up and changes nothing else, as the bias is free
    weight, bias = problem.start
    weights, biases = [], []
    for l2 in l2s:
        model = LogisticRegression(C=1 / l2, tol=GRADIENT_TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True)
        model.coef_, model.intercept_ = weight, bias + weight @ mean
        model.fit(X, problem.y, sample_weight=problem.sample_weight)
        weight, bias = model.coef_.copy(), model.intercept_ - model.coef_ @ mean
        weights.append(weight)
        biases.append(bias)
    return np.stack(weights), np.stack(biases), {}

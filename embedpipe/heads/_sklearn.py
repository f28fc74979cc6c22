"""Solver `sklearn`: the same objective is C = 1 / l2 with sample weights of sum 1.

>>> [solution] = solve_path(problem, [1e-3])
"""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.linear_model import LogisticRegression

from embedpipe.heads._problem import Problem, Solution

GRADIENT_TOLERANCE, ITERATIONS = 1e-8, 20_000


def solve_path(problem: Problem, l2s: Sequence[float], start: Solution | None = None) -> list[Solution]:
    """Minimise the objective for every l2, falling, each from the solution before it."""
    mean = problem.sample_weight @ problem.array
    X = problem.array - mean  # float64; the bias is free, so centring changes nothing but the speed
    solution, solutions = start or problem.blind, []
    for l2 in l2s:
        model = LogisticRegression(C=1 / l2, tol=GRADIENT_TOLERANCE, max_iter=ITERATIONS, warm_start=True)
        model.coef_, model.intercept_ = solution.weight, solution.bias + solution.weight @ mean
        model.fit(X, problem.y, sample_weight=problem.sample_weight)
        solution = Solution(model.coef_.copy(), model.intercept_ - model.coef_ @ mean)
        solutions.append(solution)
    return solutions

"""Solver `lbfgs`: SciPy's L-BFGS on the same objective, one l2 after the other, each from the optimum before.

The variables are scaled: in the eigenbasis of the covariance of the features, each weight is divided by the square root of the
diagonal of the preconditioner of `newton`, curvature * eigenvalue + l2. The iteration stops at a gap of TOLERANCE.

Source: Liu and Nocedal, On the limited memory BFGS method, Math. Program. 45 (1989).

>>> weight, bias, _ = solve_path(problem, [1e-3])
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import minimize

from embedpipe.heads._batched_objective import BatchedObjective, Iterates
from embedpipe.heads._problem import Float64, PathWeights, Problem

TOLERANCE = 1e-5  # of the gap
MAX_ITERATIONS, HISTORY = 1000, 20
CONTINUATION = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of larger l2 that lead to a small one


def solve_path(problem: Problem, l2s: Sequence[float]) -> PathWeights:
    """Minimise the objective for every l2, in falling order."""
    objective = BatchedObjective(problem)
    W, b = objective.start
    larger = [l2 for l2 in CONTINUATION if l2 > l2s[0]]
    optima = []
    for l2 in [*larger, *l2s]:
        at = minimise(objective, objective.evaluate(torch.tensor([l2], dtype=torch.float64), W, b))
        W, b = at.W, at.b
        optima.append((W, b))
    weight, bias = (torch.cat(parts) for parts in zip(*optima[len(larger) :], strict=True))
    return *objective.leave(weight, bias), {}


def minimise(objective: BatchedObjective, at: Iterates) -> Iterates:
    """Minimise the objective of one problem from an iterate of it."""
    spectrum, basis, _ = objective.covariance
    scale_W = (at.curvature[:, :, None] * spectrum + at.l2[:, None, None]).rsqrt()
    scale_b = at.curvature.rsqrt()
    variables = torch.cat([at.W @ basis / scale_W, (at.b / scale_b)[..., None]], 2)
    last = at

    def value_and_gradient(flat: Float64) -> tuple[float, Any]:
        nonlocal last
        scaled = torch.from_numpy(flat.copy()).view_as(variables)
        last = objective.evaluate(at.l2, (scaled[..., :-1] * scale_W) @ basis.T, scaled[..., -1] * scale_b)
        gradient = torch.cat([last.grad_W @ basis * scale_W, (last.grad_b * scale_b)[..., None]], 2)
        return float(last.objective), gradient.flatten().numpy()

    def stop_at_optimum(intermediate_result: Any) -> None:
        if last.gap <= TOLERANCE:
            raise StopIteration

    options = {"maxcor": HISTORY, "maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "ftol": 0.0, "gtol": 0.0}
    if not at.gap <= TOLERANCE:
        flat = variables.flatten().numpy()
        minimize(value_and_gradient, flat, jac=True, method="L-BFGS-B", callback=stop_at_optimum, options=options)
    if not last.gap <= 100 * TOLERANCE:
        warnings.warn(f"lbfgs has not converged at l2 = {float(at.l2):g}", RuntimeWarning, stacklevel=2)
    return last

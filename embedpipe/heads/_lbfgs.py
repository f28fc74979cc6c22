"""Solver `lbfgs`: SciPy's L-BFGS on the same objective, one l2 after the other.

The variables are scaled: in the eigenbasis of the covariance of the features, each weight is divided by the square root of the
diagonal of the preconditioner of `newton`, curvature * eigenvalue + l2. The iteration stops at a gap of TOLERANCE.

Source: Liu and Nocedal, On the limited memory BFGS method, Math. Program. 45 (1989).

>>> weight, bias, objective = make_solver(problem)([1e-3], weight, bias, tolerance=4e-7)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from scipy.optimize import minimize

from embedpipe.heads._batched_objective import BatchedObjective, Iterates
from embedpipe.heads._problem import Float64, Optimum, Problem, Solve

TOLERANCE = 1e-5  # of the gap
MAX_ITERATIONS, HISTORY = 1000, 20


def make_solver(problem: Problem, pool: ThreadPoolExecutor | None = None) -> Solve:
    """Return a function that minimises the objective of a problem."""
    return partial(_solve, BatchedObjective(problem, pool))


def _solve(
    objective: BatchedObjective, l2s: Sequence[float], weight: Float64, bias: Float64, tolerance: float
) -> Optimum:
    """Minimise the objective for L values of l2; the tolerance is that of this module, or a larger one."""
    W, b = objective.enter(weight, bias)
    starts = [objective.evaluate(torch.tensor([l2]).double(), W[[k]], b[[k]]) for k, l2 in enumerate(l2s)]
    found = [minimise(objective, at, max(tolerance, TOLERANCE)) for at in starts]
    weights, biases = (torch.cat(parts) for parts in zip(*((at.W, at.b) for at in found), strict=True))
    return *objective.leave(weights, biases), torch.cat([at.objective for at in found]).numpy()


def minimise(objective: BatchedObjective, at: Iterates, tolerance: float) -> Iterates:
    """Minimise the objective of one problem from an iterate of it, to a gap of at most `tolerance`."""
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
        if last.gap <= tolerance:
            raise StopIteration

    options = {"maxcor": HISTORY, "maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "ftol": 0.0, "gtol": 0.0}
    if not at.gap <= tolerance:
        flat = variables.flatten().numpy()
        minimize(value_and_gradient, flat, jac=True, method="L-BFGS-B", callback=stop_at_optimum, options=options)
    if not last.gap <= 100 * tolerance:
        warnings.warn(f"lbfgs has not converged at l2 = {float(at.l2):g}", RuntimeWarning, stacklevel=2)
    return last

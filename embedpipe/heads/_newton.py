"""Solver `newton`: Newton's method with conjugate gradients, for several l2 at once, with a certified optimality gap.

One iteration, for L values of l2:

1. `newton_direction` solves for the direction by preconditioned conjugate gradients.
2. A backtracking line search divides the step by 4 until the objective decreases sufficiently (Armijo's condition).
3. A problem is finished as soon as its gap, an upper bound on (f - min f) / f, is small enough. f is l2-strongly convex in the
   weights, so ||gradient||^2 / (2 l2) is such a bound (`Iterates.gap`).

Source: Nocedal and Wright, Numerical Optimization, 7.1 (line search Newton-CG).

>>> solve = make_solver(problem)
>>> weight, bias, objective = solve([1e-2, 1e-3], weight, bias, tolerance=4e-7)       # (L, K, D), (L, K), (L,)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from embedpipe.heads._batched_objective import BatchedObjective, Iterates, Weights
from embedpipe.heads._conjugate_gradients import inner, newton_direction
from embedpipe.heads._problem import TOLERANCE, Float64, Optimum, Problem, Solve

MAX_STEPS, MAX_BACKTRACKS = 100, 40
ARMIJO = 1e-4
FLOAT32_TOLERANCE = 1e-10  # below which products in float32 gain little


def make_solver(problem: Problem, pool: ThreadPoolExecutor | None = None) -> Solve:
    """Return a function that minimises the objective of a problem."""
    return partial(solve, BatchedObjective(problem, pool))


def solve(
    objective: BatchedObjective, l2s: Sequence[float], weight: Float64, bias: Float64, tolerance: float
) -> Optimum:
    """Minimise the objective for L values of l2 from weights (L, K, D) and biases (L, K) of its problem."""
    at = minimise(objective, l2s, *objective.enter(weight, bias), tolerance=tolerance)
    return *objective.leave(at.W, at.b), at.objective.numpy()


def minimise(
    objective: BatchedObjective,
    l2s: Sequence[float],
    W: Tensor,
    b: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Iterates:
    """Minimise the objective for L values of l2 from W (L, K, D), b (L, K).

    Below TOLERANCE, steps are taken as long as they quarter the gap. What does not reach TOLERANCE, or a larger `tolerance`,
    raises a warning.
    """
    if objective.dtype is torch.float32:
        tolerance = max(tolerance, FLOAT32_TOLERANCE)
    W, b = objective.centre_logits(W, b)
    at = objective.evaluate(torch.tensor(l2s, dtype=torch.float64), _to_float32(W), b)
    unfinished = torch.arange(len(l2s))
    best = replace(at[unfinished], probabilities=None)  # a copy
    for _ in range(max_steps):
        is_open = at.gap > tolerance
        if not is_open.any():
            return best
        at, unfinished, gap = at[is_open], unfinished[is_open], at.gap[is_open]
        direction = newton_direction(objective, at, tolerance=tolerance)
        convert = _to_float32 if _rounding_is_negligible(objective, at, tolerance) else torch.clone
        at, moved = line_search(objective, at, direction, convert, tolerance)
        better = (gap > TOLERANCE) | (at.gap < gap)  # near the optimum a lower objective may have a larger gap
        best.put(unfinished[better], at[better])
        if not moved or bool(((gap <= TOLERANCE) & (at.gap > gap / 4)).all()):
            break
    worst = int(best.gap.argmax())
    if best.gap[worst] > max(tolerance, TOLERANCE):
        warnings.warn(
            f"newton has not converged at l2 = {l2s[worst]:g}: "
            f"the objective may be up to {float(best.gap[worst]):.1e} above its minimum, relative to it",
            RuntimeWarning,
            stacklevel=2,
        )
    return best


def line_search(
    objective: BatchedObjective, at: Iterates, direction: Weights, convert: Callable[[Tensor], Tensor], tolerance: float
) -> tuple[Iterates, bool]:
    """Return the iterates after a step, and whether any moved.

    Parameters
    ----------
    direction : dW (L, K, D) and db (L, K)
    convert : W -> W     rounding of the new weights
    tolerance : float    an iterate with such a gap is accepted in any case; so is one that quarters a gap of TOLERANCE or
                         less, where rounding may hide that the objective falls
    """
    dW, db = direction
    slope = inner(at.grad_W, at.grad_b, dW, db)
    descends = (slope < 0) & slope.isfinite() & dW.isfinite().flatten(1).all(1)  # else rounding error or overflow
    slope, dW, db = (torch.where(descends.view(-1, *[1] * (part.ndim - 1)), part, 0) for part in (slope, dW, db))
    length, rounding = torch.ones_like(slope), torch.finfo(objective.dtype).eps * at.objective
    for _ in range(MAX_BACKTRACKS):
        new = objective.evaluate(at.l2, convert(at.W + length[:, None, None] * dW), at.b + length[:, None] * db)
        accepted = new.objective <= at.objective + ARMIJO * length * slope + rounding
        accepted |= (new.gap <= tolerance) | ((at.gap <= TOLERANCE) & (new.gap <= at.gap / 4))
        if accepted.all():
            return new, bool(descends.any())
        length = torch.where(accepted, length, length / 4)
    length = torch.where(accepted, length, 0)
    new = objective.evaluate(at.l2, at.W + length[:, None, None] * dW, at.b + length[:, None] * db)
    return new, bool((descends & (length > 0)).any())


def _to_float32(W: Tensor) -> Tensor:
    """Round to float32, for which `evaluate` needs one product less."""
    return W.float().double()


def _rounding_is_negligible(objective: BatchedObjective, at: Iterates, tolerance: float) -> bool:
    """Return whether rounding W to float32 changes the gap negligibly: by the Hessian times the rounding error."""
    variance = torch.finfo(torch.float32).eps ** 2 / 12 * at.W.square().mean((1, 2))
    change = variance * at.W.shape[1] * objective.covariance[0].square().sum() * at.curvature.amax(1).square()
    return bool((change / (2 * at.l2 * at.objective) < 0.01 * tolerance).all())

"""Solver `newton`: Newton's method with conjugate gradients for a whole path of l2, with a certified optimality gap.

One iteration, for a batch of L values of l2 at once:

1. `newton_direction` solves for the direction by preconditioned conjugate gradients.
2. A backtracking line search divides the step by 4 until the objective decreases sufficiently (Armijo's condition).
3. A problem is finished as soon as its gap, an upper bound on (f - min f) / f, is at most TOLERANCE. f is l2-strongly convex in
   the weights, so ||gradient||^2 / (2 l2) is such a bound (`Iterates.gap`). What does not get there raises a warning.

Path. With few classes a matrix product is faster for several l2 together. The path is solved in passes over every 11th, 5th, 2nd
and finally every l2, each starting from a polynomial through the optima of the passes before (`extrapolate`). Many classes fill
matrix products alone and are solved for one l2 after the other, from the largest.

Source: Nocedal and Wright, Numerical Optimization, 7.1 (line search Newton-CG).

>>> weight, bias, _ = solve_path(BatchedObjective(problem), [1e-1, 1e-2, 1e-3])     # (L, K, D), (L, K)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from embedpipe.heads._batched_objective import BatchedObjective, Iterates, Weights
from embedpipe.heads._conjugate_gradients import inner, newton_direction
from embedpipe.heads._extrapolation import extrapolate
from embedpipe.heads._problem import Float64, PathWeights

TOLERANCE = 4e-7  # of the gap
# of the gap after `polish`: the weights are then within 1e-6 of the optimum, as float32 stores them
POLISHED_TOLERANCE, POLISHING_STEPS = 1e-13, 6
MAX_STEPS, MAX_BACKTRACKS = 100, 40
BATCH = 12  # problems at most
STRIDES = (11, 5, 2, 1)  # passes over the path
MANY_CLASSES = 24  # from which one l2 is solved after the other
ARMIJO = 1e-4
MAX_STALLS = 3  # steps that do not halve the gap, after which bfloat16 is no longer used
DISTANT = 1.0  # a gap from which one step is not expected to reach the optimum
# continuation: many classes reach an l2 of at most CONTINUE_BELOW through larger ones, solved to a loose tolerance
CONTINUE_BELOW, CONTINUE_FROM, CONTINUE_FACTOR, LOOSE_TOLERANCE = 1e-4, 1e-2, 5.0, 0.1


def solve_path(objective: BatchedObjective, l2s: Sequence[float]) -> PathWeights:
    """Minimise the objective for every l2, in falling order."""
    W, b = objective.start
    if objective.n_logits >= MANY_CLASSES and l2s[0] <= CONTINUE_BELOW:
        larger = [CONTINUE_FROM]
        while larger[-1] / CONTINUE_FACTOR > l2s[0]:
            larger.append(larger[-1] / CONTINUE_FACTOR)
        W, b = extrapolate(l2s[0], _solve(objective, larger, W, b, tolerance=LOOSE_TOLERANCE))
    optima = _solve(objective, l2s, W, b)
    weight, bias = (torch.stack(parts) for parts in zip(*(optima[l2] for l2 in l2s), strict=True))
    return *objective.leave(weight, bias), {}


def polish(objective: BatchedObjective, weight: Float64, bias: Float64, l2: float) -> PathWeights:
    """Return a solution nearer to the optimum than weights (K, D) and bias (K,), so that it does not depend on the path."""
    W, b = objective.enter(weight, bias)
    at = minimise(objective, [l2], W, b, tolerance=POLISHED_TOLERANCE, max_steps=POLISHING_STEPS, bfloat16=False)
    return *objective.leave(at.W, at.b), {}


def _solve(
    objective: BatchedObjective, l2s: Sequence[float], W: Tensor, b: Tensor, *, tolerance: float = TOLERANCE
) -> dict[float, Weights]:
    """Return the optimum W (K, D), b (K,) of each l2; the first batch starts from W (1, K, D), b (1, K)."""
    few = objective.n_logits < MANY_CLASSES
    size = min(BATCH, objective.max_batch) if few else 1
    optima: dict[float, Weights] = {}
    for stride in STRIDES if few else (1,):
        todo = [l2 for l2 in dict.fromkeys([*l2s[::stride], l2s[-1]]) if l2 not in optima]
        for first in range(0, len(todo), size):
            batch = todo[first : first + size]
            starts = [extrapolate(l2, optima) if optima else (W, b) for l2 in batch]
            start_W, start_b = (torch.cat(parts) for parts in zip(*starts, strict=True))
            at = minimise(objective, batch, start_W, start_b, tolerance=tolerance)
            optima.update(zip(batch, zip(at.W, at.b, strict=True), strict=True))
    return optima


def minimise(
    objective: BatchedObjective,
    l2s: Sequence[float],
    W: Tensor,
    b: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
    bfloat16: bool = True,
) -> Iterates:
    """Minimise the objective for L values of l2 from W (L, K, D), b (L, K).

    bfloat16 : bool    whether Hessian-vector products may be in bfloat16 if the objective allows it, as long as that does not
                       slow the convergence
    """
    W, b = objective.centre_logits(W, b)
    at = objective.evaluate(torch.tensor(l2s, dtype=torch.float64), _to_float32(W), b)
    unfinished, stalls = torch.arange(len(l2s)), 0
    best = replace(at[unfinished], probabilities=None)  # a copy
    for _ in range(max_steps):
        is_open = at.gap > tolerance
        if not is_open.any():
            return best
        at, unfinished, gap = at[is_open], unfinished[is_open], at.gap[is_open]
        direction = newton_direction(objective, at, tolerance=tolerance, bfloat16=bfloat16)
        convert = _to_float32 if _rounding_is_negligible(objective, at, tolerance) else torch.clone
        at, moved = line_search(objective, at, direction, convert, tolerance)
        better = (gap > TOLERANCE) | (at.gap < gap)  # near the optimum a lower objective may have a larger gap
        best.put(unfinished[better], at[better])
        stalled = bool(((at.gap > gap / 2) & (gap < DISTANT)).any())
        stalls += stalled
        if stalled and stalls >= MAX_STALLS and bfloat16 and objective.bfloat16:
            bfloat16 = False
            continue
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

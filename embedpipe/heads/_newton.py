"""Solver `newton`: Newton's method with conjugate gradients, many l2 at a time, to a proved optimum.

The step of each l2 is found by conjugate gradients on the Hessian, in the eigenbasis of the features' covariance, which
preconditions it. Where that takes many products, the covariance is measured again, each row counting with its p (1 - p): for two
classes that is the Hessian itself. The penalty stays on the weights.

Of few classes many l2 are solved together, which fills matrix products: first a few that lie far apart, then those between, and
so on, each from a curve through its neighbours (`_starts`). Many classes fill products alone: one l2 is solved after the other,
falling, and what was found for the last ones saves products for the next (`_trail`, `_entries`).

The objective is l2-strongly convex in the weights, so its squared gradient / (2 l2) bounds what is left to gain. That bound,
relative to the objective, is at most TOLERANCE for every solution, or a warning says so.

Source: Nocedal and Wright, Numerical Optimization, 7.1 (line search Newton-CG) and 5.1 (preconditioning).

>>> [solution] = solve_path(problem, [1e-3])
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from embedpipe.heads._directions import PRODUCTS, Points, dot, find_direction
from embedpipe.heads._problem import Float64, Problem, Solution, centred, narrow
from embedpipe.heads._starts import Solved
from embedpipe.heads._sweeps import MANY_CLASSES, Metric, Sweeps
from embedpipe.heads._trail import Beside, Trail

TOLERANCE = 4e-7  # of the bound on what is left to gain, relative to the objective
POLISHED = 1e-10  # what is left to gain after `polish`, where rounding and so many steps and products for each allow it
POLISHING, POLISHING_PRODUCTS = 3, 20
STEPS, HALVINGS = 100, 40  # at most, in a minimisation, in a line search
TOGETHER = 12  # so many l2 at a time
STRIDES = (11, TOGETHER), (5, TOGETHER), (2, TOGETHER), (1, TOGETHER)  # every eleventh l2 first, from nothing
STEEP = 1e-4  # an l2 from which many classes do not start from nothing
TOP, RUNG, LOOSE = 1e-2, 5.0, 0.1  # but come down: from here, by such a factor, each so near its optimum
UNSEEN = 0.25  # of what may be left, that a gradient may be off by
FAR = 1.0  # a gap from which no step reaches the optimum
WORN = 20  # products for a step: the metric is measured again
LEAST_SPREAD = 1e-12  # of a class that every sample is already sure about

_metrics: WeakKeyDictionary[Problem, Metric] = WeakKeyDictionary()  # as `solve_path` measured them, for `polish`


def solve_path(problem: Problem, l2s: Sequence[float], start: Solution | None = None) -> list[Solution]:
    """Minimise the objective for every l2, falling."""
    small, ground = _ground(problem)
    given = ground.enter(start) if start else None
    if given and not small.objective(given, l2s[0]) < small.objective(small.blind, l2s[0]):
        given = None  # from afar a start is no help
    many = small.rows >= MANY_CLASSES
    sweeps = (Trail if many else Sweeps)(small, kept_bytes=problem.memory_bytes // 2)
    steep = many and not given and l2s[0] <= STEEP
    _metrics[problem] = metric = sweeps.measure()
    sweeps.shorten(metric, l2s[-1], turned=steep or len(l2s) > 1)
    way = _Way(sweeps, metric, given or small.blind, l2s)
    if steep:
        way.come_down()
    for stride, most in [(1, 1)] if many else STRIDES:
        way.solve(stride, most)
    return [ground.leave(W, b) for W, b in zip(way.W, way.b, strict=True)]


def polish(problem: Problem, solution: Solution, l2: float) -> Solution:
    """Take the last steps to an optimum, so far that weights do not tell which way they came: through memory or in chunks,
    with which other l2.
    """
    small, ground = _ground(problem)
    sweeps, start = Sweeps(small, kept_bytes=problem.memory_bytes // 2), ground.enter(solution)
    W, b = torch.from_numpy(start.weight)[None], torch.from_numpy(start.bias)[None]
    at = torch.tensor([l2], dtype=torch.float64)
    metric = _metrics.get(problem)
    points = minimise(sweeps, at, W, b, metric, tolerance=POLISHED, steps=POLISHING, products=POLISHING_PRODUCTS)
    return ground.leave(points.W[0], points.b[0])


@dataclass(frozen=True, eq=False)
class _Ground:
    """Where a problem is solved: around the middle (D,) of its rows, in the span (D, r) of these where they are few."""

    middle: Float64
    basis: Float64 | None

    def enter(self, solution: Solution) -> Solution:
        weight = solution.weight if self.basis is None else solution.weight @ self.basis
        return Solution(weight, solution.bias + solution.weight @ self.middle)

    def leave(self, W: Tensor, b: Tensor) -> Solution:
        weight = W.numpy() if self.basis is None else W.numpy() @ self.basis.T
        return Solution(weight, b.numpy() - weight @ self.middle)


def _ground(problem: Problem) -> tuple[Problem, _Ground]:
    around, middle = centred(problem)
    small, basis = narrow(around)
    return small, _Ground(middle, basis)


class _Way:
    """The l2 of a path, falling, with the weights found so far."""

    def __init__(self, sweeps: Sweeps, metric: Metric, start: Solution, l2s: Sequence[float]) -> None:
        self.sweeps, self.metric, self.l2 = sweeps, metric, torch.tensor(l2s, dtype=torch.float64)
        self.W = torch.from_numpy(start.weight).repeat(len(l2s), 1, 1)
        self.b = torch.from_numpy(start.bias).repeat(len(l2s), 1)
        self.open = set(range(len(l2s)))
        self.solved = Solved(metric, sweeps.dtype)

    def come_down(self) -> None:
        """Start from larger l2 that are solved loosely, one after the other."""
        l2, last = TOP, float(self.l2[0])
        solved = Solved(self.metric, self.sweeps.dtype)
        W, b = self.W[:1], self.b[:1]
        while l2 > last:
            points = minimise(self.sweeps, self.l2.new_tensor([l2]), W, b, self.metric, tolerance=LOOSE)
            solved.add(l2, points.W[0], points.b[0], float(points.spread.mean()))
            l2 = max(l2 / RUNG, last)
            W, b, _ = solved.start(l2)
        self.W[:], self.b[:] = W, b

    def solve(self, stride: int, most: int) -> None:
        """Solve every so many, the first and the last among them, at most so many at a time."""
        wanted = sorted({*range(0, len(self.l2), stride), len(self.l2) - 1} & self.open)
        most = min(most, self.sweeps.most)
        for first in range(0, len(wanted), most):
            self._solve(wanted[first : first + most])

    def _solve(self, some: list[int]) -> None:
        beside = None
        for number in some if self.solved else ():
            self.W[[number]], self.b[[number]], beside = self.solved.start(float(self.l2[number]))
        points = minimise(self.sweeps, self.l2[some], self.W[some], self.b[some], self.metric, beside=beside)
        self.W[some], self.b[some] = points.W, points.b
        for number, W, b, spread in zip(some, self.W[some], self.b[some], points.spread.mean(1), strict=True):
            self.solved.add(float(self.l2[number]), W, b, float(spread), self.sweeps.last)
        self.open -= {*some}


def minimise(
    sweeps: Sweeps,
    l2: Tensor,
    W: Tensor,
    b: Tensor,
    metric: Metric | None = None,
    *,
    tolerance: float = TOLERANCE,
    steps: int | None = None,
    products: int = PRODUCTS,
    beside: Beside | None = None,
) -> Points:
    """Minimise the objective for L values of l2 from W (L, K, D), b (L, K); return where that ends.

    beside : Beside, optional    what is known of points near the start
    """
    W, b = sweeps.level(W, b)
    start = W if beside and beside.shares else _short(W)
    whole = points = _points(sweeps, l2, start, b.clone(), far=not W.any(), beside=beside)
    metric, worn, slow, left = metric or sweeps.measure(len(l2) // 2), 0, 0, torch.arange(len(l2))
    for _ in range(steps or STEPS):
        open_ = points.gap > tolerance
        if not open_.any():
            return whole
        points, left, which = points[open_], left[open_], open_.nonzero()[:, 0]
        dW, db, took = find_direction(sweeps, points, which, metric, tolerance=tolerance, most=products)
        worn += took > WORN and sweeps.rows < MANY_CLASSES
        shape = _short if _may_be_short(points, metric, tolerance) else torch.clone
        before = points.gap
        points, moved = _step(sweeps, points, dW, db, shape, tolerance)
        keep = (before > TOLERANCE) | (points.gap < before)  # a step may gain, and prove less
        whole.put(left[keep], points[keep])
        slow += (gains_little := bool(((points.gap > before / 2) & (before < FAR)).any()))
        if gains_little and sweeps.distrust(slow):
            continue
        if not moved or bool(((before <= TOLERANCE) & (points.gap > before / 4)).all()):
            break
        if worn == 1:  # once: the weights of the rows hardly change any more
            metric, worn = sweeps.measure(len(points.l2) // 2), 2
    worst = float(whole.gap.max())
    if worst > max(tolerance, TOLERANCE):
        l2_of_worst = float(whole.l2[whole.gap.argmax()])
        warnings.warn(
            f"newton has not converged at l2 = {l2_of_worst:g}: up to {worst:.1e} of the objective may be left",
            RuntimeWarning,
            stacklevel=2,
        )
    return whole


def _points(
    sweeps: Sweeps, l2: Tensor, W: Tensor, b: Tensor, *, far: bool = False, beside: Beside | None = None
) -> Points:
    penalty = l2 / 2 * W.square().sum((1, 2))
    if beside:
        unseen = UNSEEN * TOLERANCE * 2 * float(l2[0])
        found = sweeps.value_beside(W, b, beside, lambda loss: unseen * (loss + float(penalty[0])))
    else:
        found = sweeps.value(W, b, far=far)
    loss, grad_W, grad_b, spread = found
    gradients = grad_W + l2[:, None, None] * W, grad_b
    noise = torch.full_like(loss, sweeps.noise(far=far))
    return Points(l2, W, b, loss + penalty, *gradients, spread.clamp_min(LEAST_SPREAD), sweeps.reach(W, b), noise)


def _short(W: Tensor) -> Tensor:
    """Return weights that float32 holds; `value` is quicker for them."""
    return W.float().double()


def _may_be_short(points: Points, metric: Metric, tolerance: float) -> bool:
    """Tell whether that would not be seen in the gap: rounding moves the gradient by the Hessian times what it takes off."""
    off = torch.finfo(torch.float32).eps ** 2 / 12 * points.W.square().mean((1, 2))
    moved = off * points.W.shape[1] * metric.spectrum.square().sum() * points.spread.amax(1).square()
    return bool((moved / (2 * points.l2 * points.objective) < 0.01 * tolerance).all())


def _step(
    sweeps: Sweeps, points: Points, dW: Tensor, db: Tensor, shape: Callable[[Tensor], Tensor], tolerance: float
) -> tuple[Points, bool]:
    """Return the points after a step along (dW, db), halved for each problem until it gains; and whether any moved.

    shape : W -> W       what weights are made into before they are looked at
    tolerance : float    of the gap: such a point is good, whatever rounding says of the gain
    """
    slope = dot(points.grad_W, points.grad_b, dW, db)
    down = (slope < 0) & slope.isfinite() & dW.isfinite().flatten(1).all(1)  # else rounding has the say, or overflow
    slope, dW, db = (torch.where(down.view(-1, *[1] * (one.ndim - 1)), one, 0) for one in (slope, dW, db))
    length = torch.ones_like(slope)
    far = bool((points.gap > FAR).all())
    for _ in range(HALVINGS):
        W = shape(points.W + length[:, None, None] * dW)
        new = _points(sweeps, points.l2, W, points.b + length[:, None] * db, far=far)
        good = new.objective <= points.objective + 1e-4 * length * slope + points.noise * points.objective
        good |= new.gap <= tolerance
        if good.all():
            return new, bool(down.any())
        length = torch.where(good, length, length / 4)
    length = torch.where(good, length, torch.zeros_like(length))
    new = _points(sweeps, points.l2, points.W + length[:, None, None] * dW, points.b + length[:, None] * db)
    return new, bool((down & (length > 0)).any())

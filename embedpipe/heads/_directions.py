"""Newton's directions, by conjugate gradients that stop as soon as more would not be seen, for many l2 at a time.

What stands in for the Hessian's inverse: for every class the covariance of the features times the mean of p (1 - p), plus l2,
inverted in one eigenbasis for all classes and l2. But each class weighs rows by its own p (1 - p), which change along the weights
alone: of Gaussian features the Hessian of a class and that covariance differ nowhere else (Stein's lemma). So in the span of the
weights, and for the bias, the Hessian of each class itself takes the covariance's place, measured on some rows. Of many classes
that would cost what it saves; there the covariance is taken around the mean of the rows that count for each class.

Source: Nocedal and Wright, Numerical Optimization, 5.1 (preconditioning) and 7.1 (inexact Newton).

>>> dW, db, products = find_direction(sweeps, points, which, metric, tolerance=4e-7)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from embedpipe.heads._sweeps import MANY_CLASSES, Metric, Sweeps

PRODUCTS = 60  # at most
SHARE = 0.2  # of the gradient, squared, that may be left; less near the optimum, where the model holds
FEW = 0.02  # of the gradient, squared, that a few products leave


@dataclass(frozen=True, eq=False)
class Points:
    """L problems, each at its weights: float64 l2 (L,), W (L, K, D), b (L, K), objective (L,), its gradients, mean p (1 - p).

    reach : (L, K)    squared length of the middle of the rows that count for a class: what its bias lacks, the weights feel
    noise : (L,)      how far rounding may have moved the objective, relative to it
    """

    l2: Tensor
    W: Tensor
    b: Tensor
    objective: Tensor
    grad_W: Tensor
    grad_b: Tensor
    spread: Tensor
    reach: Tensor
    noise: Tensor

    def __getitem__(self, which: Tensor) -> Points:
        return Points(*(getattr(self, one.name)[which] for one in fields(self)))

    def put(self, which: Tensor, points: Points) -> None:
        for one in fields(self):
            getattr(self, one.name)[which] = getattr(points, one.name)

    @property
    def gap(self) -> Tensor:
        """A bound (L,) on what is left to gain, relative to the objective; infinite where numbers have overflown."""
        found = self.left(self.grad_W, self.grad_b) / (2 * self.objective)
        return torch.where(self.objective.isfinite() & found.isfinite(), found, torch.inf)

    def left(self, W: Tensor, b: Tensor) -> Tensor:
        """Return the bound (L,) on what a gradient leaves to gain, times 2."""
        return W.square().sum((1, 2)) / self.l2 + (b.square() * (1 / self.spread + self.reach / self.l2[:, None])).sum(
            1
        )


def find_direction(
    sweeps: Sweeps, points: Points, which: Tensor, metric: Metric, *, tolerance: float, most: int = PRODUCTS
) -> tuple[Tensor, Tensor, int]:
    """Return Newton's step (L, K, D), (L, K), and how many products the slowest took.

    The residual of the linear system is the gradient that is left where the model holds: it need not be smaller than what ends
    the minimisation, nor, far from there, than a share of the gradient.

    Where all weights are zero, all rows count the same: the metric is the Hessian, but for the rows that measured it.

    which : int64 (L,)    numbers of the problems in the last `value`
    most : int            products
    """
    enough = 0.2 * tolerance * 2 * points.objective
    first = points.left(points.grad_W, points.grad_b)
    wanted = torch.maximum(enough, first * (0.3 * points.gap).clamp(max=SHARE))
    far = bool((wanted > FEW * first).all())
    turn, precondition = sweeps.turn_to(metric), Preconditioner(sweeps, points, metric, None if far else which)
    l2 = points.l2.to(turn.dtype)[:, None, None]
    rest_V, rest_c = turn.gradient(-points.grad_W.to(turn.dtype), -points.grad_b.to(turn.dtype))
    dV, dc = torch.zeros_like(rest_V), torch.zeros_like(rest_c)
    way_V, way_c = precondition(rest_V, rest_c)
    if not points.W.any():
        W, b = turn.vector(way_V, way_c)
        return W.double(), b.double(), 0
    rough = bool((wanted >= SHARE * first).all())
    size, active = dot(rest_V, rest_c, way_V, way_c), torch.arange(len(which))
    for products in range(1, most + 1):  # noqa: B007
        hess_V, hess_c = sweeps.level(*sweeps.curve(way_V[active], way_c[active], which[active], metric, rough=rough))
        hess_V += l2[active] * way_V[active]
        bend = dot(way_V[active], way_c[active], hess_V, hess_c)
        sound = (bend > 0) & (size[active] > 0)  # else rounding hides what is left
        active, hess_V, hess_c = active[sound], hess_V[sound], hess_c[sound]
        share = size[active] / bend[sound]
        dV[active] += share[:, None, None] * way_V[active]
        dc[active] += share[:, None] * way_c[active]
        rest_V[active] -= share[:, None, None] * hess_V
        rest_c[active] -= share[:, None] * hess_c
        active = active[(points.left(rest_V, rest_c) > wanted)[active]]
        if not len(active):
            break
        next_V, next_c = precondition(rest_V, rest_c)
        ratio, size = size, dot(rest_V, rest_c, next_V, next_c)
        ratio = size / ratio
        way_V, way_c = next_V + ratio[:, None, None] * way_V, next_c + ratio[:, None] * way_c
    dW, db = turn.vector(dV, dc)
    return dW.double(), db.double(), products


def dot(W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> Tensor:
    return (W * V).sum((1, 2)) + (b * c).sum(1)


class Preconditioner:
    """Nearly the inverse of the Hessians of L problems, in the basis of the metric."""

    def __init__(self, sweeps: Sweeps, points: Points, metric: Metric, which: Tensor | None) -> None:
        """Measure what stands in for the Hessians.

        which : int64 (L,)    numbers of the problems in the last `value`; None where a few products are enough as it is
        """
        dtype = sweeps.dtype
        self._level, self._spread = sweeps.level, points.spread.to(dtype)
        self._inverse = (1 / (points.spread[:, :, None] * metric.spectrum + points.l2[:, None, None])).to(dtype)
        self._span: Tensor | None = None
        self._middles: Tensor | None = None
        if not points.W.any():
            return
        if sweeps.rows >= MANY_CLASSES and which is not None:
            self._middles = sweeps.middles(which, metric)
        elif sweeps.rows < MANY_CLASSES:
            self._span = _span(sweeps.turn_to(metric).weights(points.W))
            self._more = _correction(sweeps, points, metric, self._span).to(dtype)

    def __call__(self, V: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = V * self._inverse, c / self._spread
        if self._middles is not None:
            weight = weight - self._middles * self._inverse * c[..., None]
            bias = bias - (self._middles * weight).sum(2)
        if self._span is not None:
            along = torch.cat([V, c[:, :, None]], 2) @ self._span
            more = (self._more @ along[..., None])[..., 0] @ self._span.mT
            weight, bias = weight + more[..., :-1], bias + more[..., -1]
        return self._level(weight, bias)


def _span(V: Tensor) -> Tensor:
    """Return an orthonormal basis of weights (L, K, D) and of the bias: (L, D + 1, r)."""
    basis = torch.linalg.qr(V.mT).Q
    span = V.new_zeros(len(V), V.shape[2] + 1, basis.shape[2] + 1)
    span[:, :-1, :-1], span[:, -1, -1] = basis, 1
    return span


def _correction(sweeps: Sweeps, points: Points, metric: Metric, span: Tensor) -> Tensor:
    """Return the inverse of what the Hessian of each class is in the span, less that of what it is taken for: (L, K, r, r).

    What rows of little weight measure is drawn towards what it is taken for.
    """
    root = metric.spectrum.sqrt()[:, None] * span[:, :-1].double()
    plain = root.mT @ root
    plain[:, -1, -1] = 1
    taken = points.spread[:, :, None, None] * plain[:, None]
    found, rows = sweeps.curve_within(points.W, points.b, span, metric)
    trust = rows / (rows + span.shape[2])
    found = taken + trust[:, :, None, None] * (found - taken)
    penalty = torch.ones(span.shape[2], dtype=torch.float64)
    penalty[-1] = 0
    penalties = (points.l2[:, None] * penalty).diag_embed()[:, None]
    correction: Tensor = torch.linalg.inv(found + penalties) - torch.linalg.inv(taken + penalties)
    return correction

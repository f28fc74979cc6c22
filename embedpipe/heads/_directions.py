"""Newton's directions, by conjugate gradients that stop as soon as more would not be seen, for many l2 at a time.

What stands in for the Hessian's inverse: for every class the covariance of the features times the mean of p (1 - p), plus l2,
inverted in one eigenbasis for all classes and l2. But each class weighs rows by its own p (1 - p), which change along the weights
alone: of Gaussian features the Hessian of a class and that covariance differ nowhere else (Stein's lemma). So in the span of the
weights, and for the bias, the Hessian of each class itself takes the covariance's place, measured on some rows.

Source: Nocedal and Wright, Numerical Optimization, 5.1 (preconditioning) and 7.1 (inexact Newton).

>>> dW, db, products = find_direction(sweeps, points, which, metric, tolerance=4e-7)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from embedpipe.heads._sweeps import Metric, Sweeps

PRODUCTS = 60  # at most
SHARE = 0.1  # of the gradient, squared, that may be left; less near the optimum, where the model holds
MOST_CLASSES = 32  # whose Hessians are measured in the span of their weights; of more that costs what it saves


@dataclass(frozen=True, eq=False)
class Points:
    """L problems, each at its weights: float64 l2 (L,), W (L, K, D), b (L, K), objective (L,), its gradients, mean p (1 - p)."""

    l2: Tensor
    W: Tensor
    b: Tensor
    objective: Tensor
    grad_W: Tensor
    grad_b: Tensor
    spread: Tensor

    def __getitem__(self, which: Tensor) -> Points:
        return Points(*(getattr(self, one.name)[which] for one in fields(self)))

    @property
    def gap(self) -> Tensor:
        """A bound (L,) on what is left to gain, relative to the objective."""
        return self.left(self.grad_W, self.grad_b) / (2 * self.objective)

    def left(self, W: Tensor, b: Tensor) -> Tensor:
        """Return the bound (L,) on what a gradient leaves to gain, times 2."""
        return W.square().sum((1, 2)) / self.l2 + (b.square() / self.spread).sum(1)


def find_direction(
    sweeps: Sweeps, points: Points, which: Tensor, metric: Metric, *, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """Return Newton's step (L, K, D), (L, K), and how many products the slowest took.

    The residual of the linear system is the gradient that is left where the model holds: it need not be smaller than what ends
    the minimisation, nor, far from there, than a share of the gradient.

    which : int64 (L,)    numbers of the problems in the last `value`
    """
    precondition = Preconditioner(sweeps, points, metric)
    enough = 0.2 * tolerance * 2 * points.objective
    first = points.left(points.grad_W, points.grad_b)
    wanted = torch.maximum(enough, first * (0.3 * points.gap).clamp(max=SHARE))
    dW, db = torch.zeros_like(points.W), torch.zeros_like(points.b)
    rest_W, rest_b = -points.grad_W, -points.grad_b
    way_W, way_b = precondition(rest_W, rest_b)
    size, active = dot(rest_W, rest_b, way_W, way_b), torch.arange(len(which))
    for products in range(1, PRODUCTS + 1):  # noqa: B007
        hess_W, hess_b = sweeps.level(*sweeps.curve(way_W[active], way_b[active], which[active]))
        hess_W += points.l2[active, None, None] * way_W[active]
        share = size[active] / dot(way_W[active], way_b[active], hess_W, hess_b)
        dW[active] += share[:, None, None] * way_W[active]
        db[active] += share[:, None] * way_b[active]
        rest_W[active] -= share[:, None, None] * hess_W
        rest_b[active] -= share[:, None] * hess_b
        active = active[(points.left(rest_W, rest_b) > wanted)[active]]
        if not len(active):
            break
        next_W, next_b = precondition(rest_W, rest_b)
        ratio, size = size, dot(rest_W, rest_b, next_W, next_b)
        ratio = size / ratio
        way_W, way_b = next_W + ratio[:, None, None] * way_W, next_b + ratio[:, None] * way_b
    return dW, db, products


def dot(W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> Tensor:
    return (W * V).sum((1, 2)) + (b * c).sum(1)


class Preconditioner:
    """Nearly the inverse of the Hessians of L problems."""

    def __init__(self, sweeps: Sweeps, points: Points, metric: Metric) -> None:
        self._level, self._mean, self._spread = sweeps.level, metric.mean, points.spread
        self._inverse = (1 / (points.spread[:, :, None] * metric.spectrum + points.l2[:, None, None])).float()
        self._basis = metric.basis.float()
        self._span: Tensor | None = None
        if sweeps.rows <= MOST_CLASSES and points.W.any():
            self._span = _span(points.W, metric.mean)
            self._more = _correction(sweeps, points, metric, self._span)

    def __call__(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weight = (((W - b[:, :, None] * self._mean).float() @ self._basis * self._inverse) @ self._basis.T).double()
        bias = b / self._spread - weight @ self._mean
        if self._span is not None:
            along = torch.cat([W, b[:, :, None]], 2) @ self._span
            more = (self._more @ along[..., None])[..., 0] @ self._span.mT
            weight, bias = weight + more[..., :-1], bias + more[..., -1]
        return self._level(weight, bias)


def _span(W: Tensor, mean: Tensor) -> Tensor:
    """Return an orthonormal basis of weights (L, K, D), each with the bias that centres it, and the bias: (L, D + 1, r)."""
    basis = torch.linalg.qr(W.mT).Q
    span = W.new_zeros(len(W), W.shape[2] + 1, basis.shape[2] + 1)
    span[:, :-1, :-1], span[:, -1, :-1], span[:, -1, -1] = basis, -(mean @ basis), 1
    return span


def _correction(sweeps: Sweeps, points: Points, metric: Metric, span: Tensor) -> Tensor:
    """Return the inverse of what the Hessian of each class is in the span, less that of what it is taken for: (L, K, r, r).

    What rows of little weight measure is drawn towards what it is taken for.
    """
    root = metric.basis.mul(metric.spectrum.sqrt()).T @ span[:, :-1]
    plain = root.mT @ root
    plain[:, -1, -1] = 1
    taken = points.spread[:, :, None, None] * plain[:, None]
    found, rows = sweeps.curve_within(points.W, points.b, span)
    trust = rows / (rows + span.shape[2])
    found = taken + trust[:, :, None, None] * (found - taken)
    penalty = torch.ones(span.shape[2], dtype=torch.float64)
    penalty[-1] = 0
    penalties = (points.l2[:, None] * penalty).diag_embed()[:, None]
    correction: Tensor = torch.linalg.inv(found + penalties) - torch.linalg.inv(taken + penalties)
    return correction

"""Newton directions by preconditioned conjugate gradients, for several l2 at once.

A direction (dW, db) solves Hessian * (dW, db) = -gradient approximately. The residual is the gradient that the quadratic model
predicts at the new point. The iteration stops as soon as the residual is a fixed share of the gradient, or so small that Newton's
method would stop there.

Preconditioner. The Hessian of class k alone is the covariance of the features, each row weighted by its p (1 - p), plus l2. It is
approximated by

    curvature_k * covariance + l2          curvature_k : mean of p (1 - p)

whose inverse is diagonal in the eigenbasis of the covariance, for all classes and l2. By Stein's lemma the two differ, for
Gaussian features, only along the weights themselves. For few classes the approximation is therefore corrected within the span of
the K weight vectors and the bias, where the Hessian of each class is estimated on a sample of rows: K matrices (K + 1, K + 1).

Source: Nocedal and Wright, Numerical Optimization, 5.1 (preconditioning) and 7.1 (inexact Newton methods).

>>> dW, db = newton_direction(objective, iterates, tolerance=4e-7)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from embedpipe.heads._batched_objective import BatchedObjective, Iterates, Weights, product

MAX_PRODUCTS = 60  # Hessian-vector products for one direction
FORCING = 0.2  # largest share of the gap bound that the residual may leave; less near the optimum
RESIDUAL = 0.2  # of the tolerance that ends Newton's method


def newton_direction(objective: BatchedObjective, at: Iterates, *, tolerance: float) -> Weights:
    """Return Newton directions dW (L, K, D) and db (L, K), float64; Newton's method ends at this tolerance of the gap."""
    initial = at.gap_bound(at.grad_W, at.grad_b)
    target = torch.maximum(RESIDUAL * tolerance * at.objective, initial * (0.3 * at.gap).clamp(max=FORCING))
    precondition = make_preconditioner(objective, at)
    residual_W, residual_b = (-part.to(objective.dtype) for part in (at.grad_W, at.grad_b))
    V, c = precondition(residual_W, residual_b)
    if not at.W.any():  # all rows count the same: the preconditioner is nearly the inverse Hessian
        return V.double(), c.double()
    dW, db = torch.zeros_like(V), torch.zeros_like(c)
    size, active = inner(residual_W, residual_b, V, c), torch.arange(len(V))
    for _ in range(MAX_PRODUCTS):
        hess_V, hess_c = objective.hessian_product(at[active], V[active], c[active])
        hess_V, hess_c = objective.centre_logits(hess_V, hess_c)
        bend = inner(V[active], c[active], hess_V, hess_c)
        valid = (bend > 0) & (size[active] > 0)  # else the residual is below the rounding error
        active, hess_V, hess_c = active[valid], hess_V[valid], hess_c[valid]
        step = size[active] / bend[valid]
        dW[active] += step[:, None, None] * V[active]
        db[active] += step[:, None] * c[active]
        residual_W[active] -= step[:, None, None] * hess_V
        residual_b[active] -= step[:, None] * hess_c
        active = active[(at.gap_bound(residual_W, residual_b) > target)[active]]
        if not len(active):
            break
        next_V, next_c = precondition(residual_W, residual_b)
        last, size = size, inner(residual_W, residual_b, next_V, next_c)
        ratio = size / last
        V, c = next_V + ratio[:, None, None] * V, next_c + ratio[:, None] * c
    return dW.double(), db.double()


def inner(W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> Tensor:
    """Return the inner products (L,) of (W, b) and (V, c)."""
    return (W * V).sum((1, 2)) + (b * c).sum(1)


def make_preconditioner(objective: BatchedObjective, at: Iterates) -> Callable[[Tensor, Tensor], Weights]:
    """Return a function that multiplies gradients (L, K, D), (L, K) by the approximate inverse of the Hessians."""
    (spectrum, basis, mean), dtype = objective.covariance, objective.dtype
    inverse = (1 / (at.curvature[:, :, None] * spectrum + at.l2[:, None, None])).to(dtype)
    curvature, Q, m = at.curvature.to(dtype), basis.to(dtype), mean.to(dtype)
    span = correction = None
    if objective.is_corrected and at.W.any():
        span = _span_of_weights(at.W.to(dtype) @ Q)
        correction = _correction(objective, at, span).to(dtype)

    def precondition(grad_W: Tensor, grad_b: Tensor) -> Weights:
        rotated = product(grad_W - grad_b[..., None] * m, Q)  # of features centred and in the eigenbasis
        W, b = rotated * inverse, grad_b / curvature
        if span is not None and correction is not None:
            coefficients = torch.cat([rotated, grad_b[..., None]], 2) @ span
            more = (correction @ coefficients[..., None])[..., 0] @ span.mT
            W, b = W + more[..., :-1], b + more[..., -1]
        W = product(W, Q.T)
        return objective.centre_logits(W, b - W @ m)

    return precondition


def _span_of_weights(W: Tensor) -> Tensor:
    """Return an orthonormal basis (L, D + 1, r) of the span of weights (L, K, D) and of the bias."""
    basis = torch.linalg.qr(W.mT).Q
    span = W.new_zeros(len(W), W.shape[2] + 1, basis.shape[2] + 1)
    span[:, :-1, :-1], span[:, -1, -1] = basis, 1
    return span


def _correction(objective: BatchedObjective, at: Iterates, span: Tensor) -> Tensor:
    """Return the inverse Hessian of each class within the span, less its approximation, float64 (L, K, r, r).

    An estimate on few effective rows is shrunk towards the approximation.
    """
    spectrum, basis, mean = objective.covariance
    root = spectrum.sqrt()[:, None] * span[:, :-1].double()
    plain = root.mT @ root
    plain[:, -1, -1] = 1
    approximate = at.curvature[:, :, None, None] * plain[:, None]
    V = span[:, :-1].mT @ basis.to(span.dtype).T
    estimate, rows = objective.subspace_hessian(at, V, span[:, -1] - V @ mean.to(span.dtype))
    trust = rows / (rows + span.shape[2])
    estimate = approximate + trust[:, :, None, None] * (estimate - approximate)
    penalised = torch.ones(span.shape[2], dtype=torch.float64)
    penalised[-1] = 0
    penalty = (at.l2[:, None] * penalised).diag_embed()[:, None]
    correction: Tensor = torch.linalg.inv(estimate + penalty) - torch.linalg.inv(approximate + penalty)
    return correction

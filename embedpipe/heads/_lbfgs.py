"""Solver `lbfgs`: L-BFGS in coordinates where the curvature is close to one, float64.

The weighted Gram matrix of the centred features is G = Q diag(s) Q'. In the coordinates V with
W = V diag(1 / sqrt(c s + l2)) Q', c the mean of p (1 - p), the Hessian is nearly the identity.
The penalty stays on W itself: Q is orthogonal, so ||W|| = ||V diag(...)||, and the optimum is that
of the documented objective.

>>> [solution] = solve_path(problem, [1e-3])
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from embedpipe.heads._problem import Problem, Solution, blocks

TOLERANCE = 1e-5  # bound on what is left to gain, relative to the objective
ROUNDS, ROUND_ITERATIONS = 200, 5  # the bound is looked at once a round
LEAST_CURVATURE = 1e-9  # of a class that every sample is already sure about
APPROACH = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # on the way from nothing to a small l2


@dataclass(frozen=True, eq=False)
class Rotated:
    """The problem in the eigenbasis of its Gram matrix; the last column, all ones, is the bias."""

    Z: Tensor  # float64 (N, r + 1), r = min(N, D)
    spectrum: Tensor  # float64 (r + 1,), the diagonal of the weighted Gram matrix of Z
    penalised: Tensor  # float64 (r + 1,), 1 for weights and 0 for the bias
    basis: Tensor  # float64 (D, r), orthonormal columns
    mean: Tensor  # float64 (D,)
    y: Tensor  # int64 (N,)
    sample_weight: Tensor  # float64 (N,)

    def enter(self, solution: Solution) -> Tensor:
        weight, bias = torch.from_numpy(solution.weight), torch.from_numpy(solution.bias)
        return torch.cat([weight @ self.basis, (bias + weight @ self.mean)[:, None]], dim=1)

    def leave(self, U: Tensor) -> Solution:
        weight = U[:, :-1] @ self.basis.T
        return Solution(weight.numpy(), (U[:, -1] - weight @ self.mean).numpy())

    def loss(self, U: Tensor, l2: float) -> Tensor:
        logits = F.linear(self.Z, U)
        if len(U) == 1:
            signs = 1 - 2 * self.y
            each = F.softplus(signs * logits[:, 0], threshold=700)
        else:
            each = F.cross_entropy(logits, self.y, reduction="none")
        return self.sample_weight @ each + l2 / 2 * (U.square() @ self.penalised).sum()

    def curvature(self, U: Tensor) -> Tensor:
        """Return mean p (1 - p) of every row of U, times the spectrum: float64 (K, r + 1)."""
        logits = F.linear(self.Z, U)
        p = logits.sigmoid() if len(U) == 1 else logits.softmax(dim=1)
        mean = self.sample_weight @ (p * (1 - p))
        return mean.clamp_min(LEAST_CURVATURE)[:, None] * self.spectrum


def solve_path(problem: Problem, l2s: Sequence[float], start: Solution | None = None) -> list[Solution]:
    """Minimise the objective for every l2, falling, each from where the last two point to."""
    rotated = rotate(problem)
    before = [] if start else [l2 for l2 in APPROACH if l2 > l2s[0]]
    way = [*before, *l2s]
    U = rotated.enter(start or problem.blind)
    step = torch.zeros_like(U)  # change of U per unit of log l2
    solutions = []
    for last, l2 in zip([way[0], *way], way, strict=False):
        stride = math.log(last / l2)
        found = minimise(rotated, U + stride * step, l2)
        step = (found - U) / stride if stride else step
        U = found
        solutions.append(rotated.leave(U))
    return solutions[len(before) :]


def rotate(problem: Problem) -> Rotated:
    """Centre the features and turn them to the eigenbasis of their Gram matrix."""
    X, y = torch.from_numpy(problem.array).double(), torch.from_numpy(problem.y)
    sample_weight = torch.from_numpy(problem.sample_weight)
    mean = sample_weight @ X
    X -= mean
    basis = torch.eye(X.shape[1], dtype=torch.float64)
    if len(X) < X.shape[1]:  # the optimum lies in the span of the rows
        basis, triangle = torch.linalg.qr(X.T)
        X = triangle.T
    gram = sum(X[rows].T @ (X[rows] * sample_weight[rows, None]) for rows in blocks(X))
    spectrum, turn = torch.linalg.eigh(gram)
    Z = torch.ones(len(X), X.shape[1] + 1, dtype=torch.float64)
    Z[:, :-1] = X @ turn
    penalised = torch.ones(Z.shape[1], dtype=torch.float64)
    penalised[-1] = 0
    spectrum = torch.cat([spectrum.clamp_min(0), penalised[:1]])
    return Rotated(Z, spectrum, penalised, basis @ turn, mean, y, sample_weight)


def minimise(rotated: Rotated, U: Tensor, l2: float) -> Tensor:
    """Minimise the objective for one l2 from U, until little is left to gain or nothing moves.

    It is l2-strongly convex in the weights: squared gradient / (2 l2) bounds what is left.
    """
    curvature = rotated.curvature(U)
    scale = (curvature + l2 * rotated.penalised).rsqrt()
    convexity = torch.where(rotated.penalised > 0, torch.full_like(scale, l2), curvature)
    V = (U / scale).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [V],
        max_iter=ROUND_ITERATIONS,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss = rotated.loss(V * scale, l2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    loss, last = closure(), math.inf
    for _ in range(ROUNDS):
        assert V.grad is not None
        if ((V.grad / scale).square() / (2 * convexity)).sum() <= TOLERANCE * loss or loss >= last:
            return (V * scale).detach()
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        loss, last = closure(), loss
    warnings.warn(f"lbfgs has not converged at l2 = {l2:g}", RuntimeWarning, stacklevel=2)
    return (V * scale).detach()

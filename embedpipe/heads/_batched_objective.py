"""Loss, gradient and Hessian-vector products of the objective, for several values of l2 at once.

For each of L values of l2 the objective of weights W (K, D) and bias b (K,) is

    f(W, b) = sum_i s_i * loss(W x_i + b, y_i) + l2 / 2 * ||W||^2

with sample weights s (N,) that sum to 1. Let p (K, N) be the predicted probabilities and t (K, N) the targets, 0 or 1.

* gradient: G = (s * (p - t)) X + l2 * W, shape (K, D), and the row sums of s * (p - t), shape (K,).
* Hessian times (V, c): with z = V X' + c (K, N) and the derivative of p along z, dp = p * (z - sum_k p_k z_k) for the softmax and
  dp = p * (1 - p) * z for independent labels: (s * dp) X + l2 * V, shape (K, D), and the row sums of s * dp, shape (K,).

The L problems share every block of rows: one matrix product handles L * K rows of weights. Blocks of rows stay in the processor's
cache, may be computed in several threads, and X may be read in chunks. Large problems multiply in float32 and add the blocks up
in float64; weights are float64. NumPy multiplies: on AMD processors with AVX-512 it is twice as fast as torch, elsewhere as fast.

The features are centred if they lie far from zero, and projected onto the span of the rows if there are fewer rows than features.

Source: Böhning, Multinomial logistic regression algorithm, Ann. Inst. Stat. Math. 44 (1992), for gradient and Hessian.

>>> objective = BatchedObjective(problem)
>>> iterates = objective.evaluate(l2, W, b)                   # l2 (L,), W (L, K, D), b (L, K)
>>> hess_W, hess_b = objective.hessian_product(iterates, V, c)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from embedpipe.heads._problem import ChunkedFeatures, Float64, Int64, Problem, blocks, centre_features, project_rows

FLOAT64_SIZE = 2**22  # features of a problem that is solved in float64
BLOCK_LOGITS, BLOCK_BYTES = 2**18, 2**21  # of a block of rows, which should fit in the processor's cache
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 512, 4096
CHUNK_ROWS = 512  # of a block that is read from disk
AHEAD = 8  # blocks that are read at a time for several threads
MAX_CORRECTED = 23  # logits up to which `subspace_hessian` corrects the preconditioner; its cost grows with their cube
PROBE_ROWS = 1024  # sampled rows that estimate the curvature
COVARIANCE_ROWS = 16  # times D: sampled rows that estimate the covariance
SOFTPLUS_THRESHOLD = 40  # above which log(1 + e^z) = z; e^89 overflows float32
MIN_CURVATURE = 1e-12  # of a class that every sample predicts with certainty

Weights = tuple[Tensor, Tensor]  # W (L, K, D) and b (L, K)
Eigen = tuple[Tensor, Tensor, Tensor]  # eigenvalues (D,), eigenvectors (D, D) and mean (D,)


@dataclass(frozen=True, eq=False)
class Iterates:
    """The objective at one iterate of each of L problems, float64.

    Parameters
    ----------
    l2 : (L,)
    W : (L, K, D)
    b : (L, K)
    objective : (L,)
    grad_W : (L, K, D)
    grad_b : (L, K)
    curvature : (L, K)              weighted mean of p (1 - p) of each class
    coupling : (L, K)               squared norm of the p (1 - p)-weighted feature mean of each class, estimated on some rows
    row : int64 (L,)                row of `probabilities` that belongs to each problem
    probabilities : (P, K, N)       None if they exceed the memory limit and must be computed again
    """

    l2: Tensor
    W: Tensor
    b: Tensor
    objective: Tensor
    grad_W: Tensor
    grad_b: Tensor
    curvature: Tensor
    coupling: Tensor
    row: Tensor
    probabilities: Tensor | None

    def __getitem__(self, which: Tensor) -> Iterates:
        own = {field.name: getattr(self, field.name)[which] for field in fields(self)[:-1]}
        return replace(self, **own)

    def put(self, which: Tensor, other: Iterates) -> None:
        """Overwrite some problems, except for their probabilities."""
        for field in fields(self)[:-1]:
            getattr(self, field.name)[which] = getattr(other, field.name)

    @property
    def gap(self) -> Tensor:
        """Upper bound (L,) on (f - min f) / f; infinite after an overflow."""
        bound = self.gap_bound(self.grad_W, self.grad_b) / self.objective
        return torch.where(self.objective.isfinite() & bound.isfinite(), bound, torch.inf)

    def gap_bound(self, grad_W: Tensor, grad_b: Tensor) -> Tensor:
        """Return an upper bound (L,) on f - min f for gradients (L, K, D) and (L, K).

        f is l2-strongly convex in W, hence ||grad_W||^2 / (2 l2). Removing a bias gradient by a Newton step on the bias, whose
        curvature is the mean of p (1 - p), moves grad_W by grad_b times the p (1 - p)-weighted feature mean.

        Source: Boyd and Vandenberghe, Convex Optimization, 9.1.2.
        """
        bias = grad_b.square() * (1 / self.curvature + self.coupling / self.l2[:, None])
        return (grad_W.square().sum((1, 2)) / self.l2 + bias.sum(1)) / 2


class BatchedObjective:
    """The objective of a problem as a function of L sets of weights (L, K, D) and biases (L, K).

    Parameters
    ----------
    problem : Problem
    pool : ThreadPoolExecutor, optional    of `row_threads`, which computes blocks of rows side by side
    float64_size : int    number of features N * D up to which all is computed in float64
    """

    def __init__(
        self, problem: Problem, pool: ThreadPoolExecutor | None = None, *, float64_size: int = FLOAT64_SIZE
    ) -> None:
        self._pool = pool
        centred, self._centre = centre_features(problem)
        self.problem, self._row_basis = project_rows(centred)
        self.n, self.width = self.problem.X.shape
        self.n_logits = problem.n_logits
        self.is_corrected = self.n_logits <= MAX_CORRECTED
        is_small = self.n * self.width <= float64_size
        self._X = self.problem.X[:].astype(np.float64) if is_small else self.problem.X
        self.dtype = torch.float64 if is_small else torch.float32
        self._y, self._independent = torch.from_numpy(problem.y), problem.independent
        self._sample_weight = torch.from_numpy(problem.sample_weight)
        # number of problems whose probabilities fit in memory, those of an iterate and of the next one
        self._max_stored: int = problem.memory_bytes // 4 // (self.n * self.n_logits * self.dtype.itemsize)

    def enter(self, weight: Float64, bias: Float64) -> Weights:
        """Return weights (L, K, D) and biases (L, K) of the problem in the coordinates of this objective."""
        reduced = weight if self._row_basis is None else weight @ self._row_basis
        return torch.from_numpy(reduced), torch.from_numpy(bias + weight @ self._centre)

    def leave(self, W: Tensor, b: Tensor) -> tuple[Float64, Float64]:
        """Return weights (L, K, D) and biases (L, K) as those of the problem."""
        weight = W.numpy() if self._row_basis is None else W.numpy() @ self._row_basis.T
        return weight, b.numpy() - weight @ self._centre

    def evaluate(self, l2: Tensor, W: Tensor, b: Tensor) -> Iterates:
        """Return the objective and its gradient for l2 (L,), W (L, K, D) and b (L, K), float64."""
        batch = len(W)
        probabilities = None
        if batch <= self._max_stored:
            probabilities = torch.empty(batch, self.n_logits, self.n, dtype=self.dtype)
        parts, sample_weight = _split(W, b, self.dtype), self._sample_weight.to(self.dtype)

        def sums(rows: slice, x: Tensor) -> tuple[Tensor, ...]:
            """Return the sums over some rows: loss, p (1 - p), and both gradients."""
            p, row_loss, error = self._predict(_logits(x, *parts), rows)
            if probabilities is not None:
                probabilities[:, :, rows] = p
            weight = sample_weight[rows]
            error *= weight
            grad_W = product(error.flatten(0, 1), x).view_as(W)
            return row_loss @ weight, p.mul_(1 - p) @ weight, error.sum(2), grad_W

        loss, curvature, grad_b, grad_W = self._sum(sums, batch)
        value = loss + l2 / 2 * W.square().sum((1, 2))
        grad_W += l2[:, None, None] * W
        curvature.clamp_(min=MIN_CURVATURE)
        return Iterates(
            l2, W, b, value, grad_W, grad_b, curvature, self._coupling(W, b), torch.arange(batch), probabilities
        )

    def hessian_product(self, at: Iterates, V: Tensor, c: Tensor) -> Weights:
        """Return the Hessian at some iterates times V (L, K, D), c (L, K)."""
        sample_weight = self._sample_weight.to(self.dtype)

        def sums(rows: slice, x: Tensor) -> tuple[Tensor, ...]:
            z, p = _logits(x, V, c), self._probabilities(at, x, rows)
            dp = z.mul_(p - p * p) if self._independent else z.sub_((p * z).sum(1, keepdim=True)).mul_(p)
            dp *= sample_weight[rows]
            return product(dp.flatten(0, 1), x).view_as(V), dp.sum(2)

        hess_W, hess_b = (part.to(V.dtype) for part in self._sum(sums, len(V)))
        return hess_W + at.l2[:, None, None].to(self.dtype) * V, hess_b

    def subspace_hessian(self, at: Iterates, V: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Hessian of each class alone within the span of r vectors, estimated on some rows.

        Parameters
        ----------
        V : (L, r, D)    weights
        c : (L, r)       biases

        Returns
        -------
        float64 (L, K, r, r), and the effective number of rows that it was estimated on, (L, K) (Kish)
        """
        x, _ = self._probes
        factor = self._probe_curvature(at.W, at.b)
        z = x @ V.mT + c[:, None]
        hessian = torch.stack(
            [torch.stack([(one.T * each) @ one for each in of]) for one, of in zip(z, factor, strict=True)]
        )
        rows = factor.sum(2).square() / factor.square().sum(2).clamp_min(torch.finfo(x.dtype).tiny)
        return hessian.double(), rows.double()

    @cached_property
    def covariance(self) -> Eigen:
        """Eigenvalues (D,), eigenvectors (D, D) and mean (D,) of the weighted features, float64; of many rows, of a sample."""
        drawn, share = sample_rows(self._sample_weight, COVARIANCE_ROWS * self.width)
        mean, gram = torch.zeros(self.width, dtype=torch.float64), np.zeros((self.width, self.width))
        for part in blocks(self._X, rows=len(drawn)):
            x, weight = self._X[drawn[part]], share[part].numpy()
            mean += torch.from_numpy(weight @ x)
            x = x * np.sqrt(weight)[:, None].astype(x.dtype)
            gram += x.T @ x  # NumPy computes half of a product of a matrix with itself
        centred = torch.from_numpy(gram) - torch.outer(mean, mean)
        spectrum, basis = (part.double() for part in torch.linalg.eigh(centred.to(self.dtype)))
        return spectrum.clamp_min(0), basis, mean

    def centre_logits(self, W: Tensor, b: Tensor) -> Weights:
        """Subtract the mean over classes, which no probability of a softmax depends on."""
        if self._independent:
            return W, b
        return W - W.mean(1, keepdim=True), b - b.mean(1, keepdim=True)

    def _coupling(self, W: Tensor, b: Tensor) -> Tensor:
        x, _ = self._probes
        factor = self._probe_curvature(W, b)
        means = factor @ x / factor.sum(2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return means.square().sum(2).double()

    def _probe_curvature(self, W: Tensor, b: Tensor) -> Tensor:
        """Return p (1 - p) times the weight of some rows, (L, K, n)."""
        x, share = self._probes
        logits = _logits(x, W.to(x.dtype), b.to(x.dtype))
        p = logits.sigmoid() if self._independent else logits.softmax(1)
        return (p - p * p) * share

    @cached_property
    def _probes(self) -> tuple[Tensor, Tensor]:
        """Sampled rows (n, D) and their weights (n,), which sum to 1."""
        rows, share = sample_rows(self._sample_weight, PROBE_ROWS)
        return torch.from_numpy(self._X[rows]), share.to(self.dtype)

    def _sum(self, function: Callable[[slice, Tensor], tuple[Tensor, ...]], batch: int) -> list[Tensor]:
        """Return the sums, float64, of what a function of a slice and its rows x (n, D) returns for each block of rows."""
        total: list[Tensor] = []
        for parts in self._map(function, batch):
            if not total:
                total = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
            for whole, part in zip(total, parts, strict=True):
                whole += part
        return total

    def _map(self, function: Callable[[slice, Tensor], Any], batch: int) -> Iterator[Any]:
        """Yield what a function returns for each block of rows, in order, for a batch of problems."""
        blocks = self._blocks(batch * self.n_logits)
        if self._pool is None:
            yield from (function(rows, self._load(rows)) for rows in blocks)
            return
        while some := list(islice(blocks, AHEAD)):
            yield from self._pool.map(function, some, [self._load(rows) for rows in some])

    def _load(self, rows: slice) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._X[rows]))

    def _blocks(self, columns: int) -> Iterator[slice]:
        """Cut the rows into blocks, for a number of columns of logits."""
        most = CHUNK_ROWS if isinstance(self._X, ChunkedFeatures) else MAX_BLOCK_ROWS
        size = min(BLOCK_LOGITS // columns, BLOCK_BYTES // (self.width * 4))
        size = min(max(size // 64 * 64, MIN_BLOCK_ROWS), most)
        return (slice(start, min(start + size, self.n)) for start in range(0, self.n, size))

    def _predict(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities p (L, K, n), losses (L, n) and p - t (L, K, n) for logits (L, K, n), which are overwritten.

        The error of a class with p near 1 is computed from the other probabilities, because 1 - p would cancel.
        """
        if self._independent:
            signs = 1 - 2 * self._y[rows].reshape(-1, self.n_logits).T.to(logits.dtype)
            wrong = logits * signs
            p, loss = logits.sigmoid(), softplus(wrong, threshold=SOFTPLUS_THRESHOLD).sum(1)
            return p, loss, wrong.sigmoid_().mul_(signs)
        truth = self._y[rows].expand(len(logits), 1, -1)
        top, own = logits.amax(1, keepdim=True), logits.gather(1, truth)
        p = logits.sub_(top).exp_()
        total = p.sum(1, keepdim=True)
        p /= total
        loss = (total.log() + top - own)[:, 0]
        error = p.scatter(1, truth, 0)
        others = error.sum(1)
        error.scatter_(1, truth, -others[:, None])
        return p, torch.where(others < 0.5, -torch.log1p(-others.clamp(max=0.5)), loss), error

    def _probabilities(self, at: Iterates, x: Tensor, rows: slice) -> Tensor:
        """Return the probabilities (L, K, n) of a block of rows, stored or computed again."""
        if at.probabilities is None:
            return self._predict(_logits(x, *_split(at.W, at.b, self.dtype)), rows)[0]
        is_whole = len(at.row) == len(at.probabilities)
        return at.probabilities[slice(None) if is_whole else at.row, :, rows]


def sample_rows(weights: Tensor, size: int) -> tuple[Int64, Tensor]:
    """Draw at most `size` of N rows in proportion to their weights (N,); return indices (n,) and weights (n,) that sum to 1."""
    share = weights / weights.sum()
    if len(weights) <= 2 * size:
        return np.arange(len(weights)), share
    drawn = np.random.default_rng(0).choice(len(weights), size, p=share.numpy())
    rows, times = np.unique(drawn, return_counts=True)
    return rows, torch.from_numpy(times / size)


def _split(W: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return W (L, K, D), b (L, K) in a shorter dtype, followed by the rounding error of W unless that is zero."""
    high = W.to(dtype)
    low = (W - high).to(dtype)
    return (high, b.to(dtype), low) if low.any() else (high, b.to(dtype))


def _logits(x: Tensor, W: Tensor, b: Tensor, low: Tensor | None = None) -> Tensor:
    """Return W x + b, (L, K, n), for rows x (n, D) and what `_split` returns."""
    logits = product(x, W.flatten(0, 1).T).add_(b.reshape(-1))
    if low is not None:
        logits += product(x, low.flatten(0, 1).T)
    return logits.T.view(*b.shape, len(x))


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return A @ B, multiplied by NumPy."""
    return torch.from_numpy(A.numpy() @ B.numpy())

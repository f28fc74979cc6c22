"""Sweeps over the rows of a problem: objective and gradient, Hessian times vector, and the metric that preconditions both.

Several l2 are carried at once, so that each block of rows is multiplied by many columns: L problems of K rows each. Rows come
in blocks, so features may be a memory map. Of many rows products are float32, and their sums over blocks float64: what rounding
does to a gradient averages out. Weights are float64, and count so.

>>> sweeps = Sweeps(problem)
>>> loss, grad_W, grad_b, spread = sweeps.value(W, b)     # (L,), (L, K, D), (L, K), (L, K)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from embedpipe.heads._problem import Problem

KEPT_BYTES = 2**29  # of probabilities; more are computed again for every product
SMALL = 2**22  # features of a problem that is carried in float64
BLOCK_NUMBERS = 2**18  # of logits in a block, so that it stays in the processor's cache
FLAT = 1e-6  # of the mean eigenvalue: what varies less is not blown up
PROBES = 4096  # rows that are enough to measure what few weights see
METRIC_ROWS = 16  # times the width: rows that are enough to measure a metric


@dataclass(frozen=True, eq=False)
class Metric:
    """A weighted covariance of the features: eigenvalues (D,), eigenvectors (D, D) and mean (D,), float64."""

    spectrum: Tensor
    basis: Tensor
    mean: Tensor


@dataclass(frozen=True, eq=False)
class Whitened:
    """The rows in a basis in which all they hold varies alike: x = rows @ back + mean.

    A product with the Hessian needs few digits, and a processor that knows bfloat16 multiplies twice as many of these a second.
    In the basis of the features rounding would drown what varies little.

    rows : bfloat16 (N, D)
    back : float32 (D, D)
    mean : float64 (D,)
    """

    rows: Tensor
    back: Tensor
    mean: Tensor


class Sweeps:
    """The problem's loss without penalty, for L sets of weights (L, K, D) and biases (L, K) at once, float64.

    K = C for classes, 1 for two classes, and the number of labels where y is (N, K) of 0 and 1.
    """

    def __init__(self, problem: Problem, *, kept_bytes: int = KEPT_BYTES) -> None:
        small = len(problem.X) * problem.X.shape[1] <= SMALL
        self._X = problem.array.astype(np.float64) if small else problem.X
        self._dtype = torch.from_numpy(self._X[:1]).dtype
        self.n, self.width = problem.X.shape
        self.rows = problem.rows
        self._y = torch.from_numpy(problem.y)
        self._labels = self._y[None] if self._y.ndim == 1 else self._y.T  # (K, N) where every logit stands for itself
        self._apart = problem.apart
        self._weights = torch.from_numpy(problem.sample_weight)
        self._kept_bytes = kept_bytes
        self._bytes: int = self.n * self.rows * self._dtype.itemsize
        self._kept: Tensor | None = None  # probabilities (L, K, N) of the last `value`
        self._at: tuple[Tensor, Tensor] | None = None  # and its weights
        self._whitened: Whitened | None = None

    @property
    def most(self) -> int:
        """How many problems can be carried at once, with their probabilities kept."""
        return max(1, self._kept_bytes // self._bytes)

    def value(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loss (L,), its gradients (L, K, D) and (L, K), and the mean of p (1 - p), (L, K)."""
        many = len(W)
        loss, spread = W.new_zeros(many), W.new_zeros(many, self.rows)
        grad_W, grad_b = W.new_zeros(many * self.rows, self.width), W.new_zeros(many * self.rows)
        self._kept, self._at = None, (W, b)
        if many * self._bytes <= self._kept_bytes:
            self._kept = torch.empty(many, self.rows, self.n, dtype=self._dtype)
        for rows, x in self._blocks(many):
            p, each, error = self._answers(x, W, b, rows)
            if self._kept is not None:
                self._kept[:, :, rows] = p
            weight = self._weights[rows].to(p.dtype)
            loss += each @ weight
            spread += (p - p * p) @ weight
            error = error.mul_(weight).flatten(0, 1)
            grad_W += error @ x
            grad_b += error.sum(1)
        return loss, grad_W.view_as(W), grad_b.view_as(b), spread

    def curve(self, dW: Tensor, db: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Hessian times a vector, at the weights of the last `value`; `which` of its problems are meant."""
        white = self._whitened if self._kept is not None else None
        V, c = (dW, db) if white is None else ((dW.float() @ white.back.T).bfloat16(), db + dW @ white.mean)
        hess_W, hess_b = dW.new_zeros(db.numel(), self.width), dW.new_zeros(db.numel())
        weights = self._weights.to(self._dtype)
        for rows, x in self._blocks(len(dW), None if white is None else white.rows):
            along = _logits(x, V.to(x.dtype), c.to(x.dtype)).to(self._dtype)
            p = self._recall(x, rows, which)
            if self._apart:
                along *= p - p * p
            else:
                along -= (p * along).sum(1, keepdim=True)
                along *= p
            along = along.mul_(weights[rows]).flatten(0, 1)
            hess_W += along.to(x.dtype) @ x
            hess_b += along.sum(1)
        if white is not None:
            hess_W = (hess_W.float() @ white.back).double() + hess_b[:, None] * white.mean
        return hess_W.view_as(dW), hess_b.view_as(db)

    def curve_within(self, W: Tensor, b: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Hessian of each class at W, b in a span of weights and bias, measured on some rows.

        Parameters
        ----------
        span : float64 (L, D + 1, r)

        Returns
        -------
        float64 (L, K, r, r), and how many rows of one weight would tell as much (L, K)
        """
        x, shares = self._probes
        logits = _logits(x, W.to(x.dtype), b.to(x.dtype))
        p = logits.sigmoid() if self._apart else logits.softmax(1)
        counts = (p - p * p) * shares
        along = x @ span[:, :-1].to(x.dtype) + span[:, None, -1].to(x.dtype)
        found = [torch.stack([(z.T * count) @ z for count in each]) for z, each in zip(along, counts, strict=True)]
        rows = counts.sum(2).square() / counts.square().sum(2).clamp_min(torch.finfo(x.dtype).tiny)
        return torch.stack(found).double(), rows.double()

    @cached_property
    def _probes(self) -> tuple[Tensor, Tensor]:
        return self._draw(self._weights, PROBES)

    def _draw(self, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return rows (n, D), n at most `most`, drawn by what they count, and what each counts then (n,), together 1."""
        shares = counts / counts.sum()
        if self.n <= most:
            return torch.from_numpy(self._X[:]), shares.to(self._dtype)
        drawn = np.random.default_rng(0).choice(self.n, most, p=shares.numpy())
        drawn, times = np.unique(drawn, return_counts=True)
        return torch.from_numpy(self._X[drawn]).to(self._dtype), torch.from_numpy(times / most).to(self._dtype)

    def whiten(self, metric: Metric) -> None:
        """Carry the products of `curve` in bfloat16 from now on, where that is quicker and memory holds one more copy."""
        fits = self.n * self.width * torch.bfloat16.itemsize <= self._kept_bytes
        if not (fits and has_bfloat16() and isinstance(self._X, np.ndarray) and self._dtype == torch.float32):
            return
        scale = metric.spectrum.clamp_min(FLAT * float(metric.spectrum.mean())).sqrt()
        towards, mean = (metric.basis / scale).float(), metric.mean.float()
        rows = torch.empty(self.n, self.width, dtype=torch.bfloat16)
        for some, x in self._blocks(1):
            rows[some] = (x - mean) @ towards
        self._whitened = Whitened(rows, (metric.basis * scale).T.float().contiguous(), metric.mean)

    def measure(self, which: int | None = None) -> Metric:
        """Return the covariance of the features: each row counts with its p (1 - p), summed, in one problem of the last `value`.

        Without one all rows count as in the loss. Of many rows some are drawn, by what they count.
        """
        counts = self._weights.clone()
        if which is not None:
            assert self._at is not None
            for rows, x in self._blocks(1):
                p = self._recall(x, rows, torch.tensor([which]))[0].double()
                counts[rows] *= (p - p * p).sum(0)
            if not counts.sum() > 0:
                counts = self._weights.clone()
        enough = METRIC_ROWS * self.width
        if self.n > 2 * enough:
            drawn = self._draw(counts, enough)
            return _metric(lambda: [drawn], self.width)
        counts /= counts.sum()
        return _metric(lambda: ((x, counts[rows]) for rows, x in self._blocks(1)), self.width)

    def level(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and biases without what all classes share, which no probability shows and the optimum lacks."""
        if self._apart:
            return W, b
        return W - W.mean(1, keepdim=True), b - b.mean(1, keepdim=True)

    @property
    def noise(self) -> float:
        """How far rounding may move an objective, relative to it."""
        return torch.finfo(self._dtype).eps

    def _blocks(self, many: int, whitened: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        size = min(max(BLOCK_NUMBERS // (many * self.rows) // 64 * 64, 256), 1024 if whitened is None else 4096)
        for start in range(0, self.n, size):
            rows = slice(start, min(start + size, self.n))
            yield rows, torch.from_numpy(np.ascontiguousarray(self._X[rows])) if whitened is None else whitened[rows]

    def _answers(self, x: Tensor, W: Tensor, b: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities (L, K, n), the loss of each row (L, n), and the probabilities less the truth.

        What a row is wrong by comes from the small numbers, never from 1 - p, so that rows that are sure count right.
        """
        logits = _exact_logits(x, W, b)
        if self._apart:
            signs = 1 - 2 * self._labels[:, rows].to(x.dtype)
            against = logits * signs
            return logits.sigmoid(), softplus(against, threshold=700).sum(1), against.sigmoid_().mul_(signs)
        truth = self._y[rows].expand(len(W), 1, -1)
        top, own = logits.amax(1, keepdim=True), logits.gather(1, truth)
        p = logits.sub_(top).exp_()
        total = p.sum(1, keepdim=True)
        p /= total
        loss = (total.log() + top - own)[:, 0]
        error = p.scatter(1, truth, 0)
        wrong = error.sum(1)
        error.scatter_(1, truth, -wrong[:, None])
        return p, torch.where(wrong < 0.5, -torch.log1p(-wrong.clamp(max=0.5)), loss), error

    def _recall(self, x: Tensor, rows: slice, which: Tensor) -> Tensor:
        """Return probabilities (L, K, n) of the last `value`, in the features' precision."""
        if self._kept is not None:
            part = self._kept[:, :, rows]
            return part if len(which) == len(part) else part[which]
        assert self._at is not None
        W, b = self._at
        return self._answers(x, W[which], b[which], rows)[0]


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 faster than float32; older torch does not say."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False)


def _exact_logits(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return W x + b, (L, K, n), of float64 weights: what float32 cannot hold of them, if anything, is multiplied apart."""
    high = W.to(x.dtype)
    low = (W - high).to(x.dtype)
    if not low.any():
        return _logits(x, high, b.to(x.dtype))
    parts = _logits(x, torch.stack([high, low]), torch.stack([b, torch.zeros_like(b)]).to(x.dtype))
    return parts[0].add_(parts[1])


def _logits(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return W x + b, (L, K, n), for rows x (n, D)."""
    return torch.addmm(b.reshape(-1, 1), W.flatten(0, -2), x.T).view(*b.shape, len(x))


def _metric(parts: Callable[[], Iterable[tuple[Tensor, Tensor]]], width: int) -> Metric:
    """Return the covariance of rows (n, D) that count (n,), which sum to 1 over all parts; they are gone through twice."""
    mean = torch.zeros(width, dtype=torch.float64)
    for x, counts in parts():
        mean += counts.to(x.dtype) @ x
    gram = torch.zeros(width, width, dtype=torch.float64)
    for x, counts in parts():
        centred = (x - mean.to(x.dtype)) * counts.sqrt().to(x.dtype)[:, None]
        gram += centred.T @ centred
    spectrum, basis = (part.double() for part in torch.linalg.eigh(gram.to(centred.dtype)))
    return Metric(spectrum.clamp_min(0), basis, mean)

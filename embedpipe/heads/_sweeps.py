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
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from embedpipe.heads._problem import Chunked, Problem, blocks, some_of

if TYPE_CHECKING:
    from embedpipe.heads._trail import Beside, Record

KEPT_BYTES = 2**29  # of probabilities; more are computed again for every product
SMALL = 2**22  # features of a problem that is carried in float64
BLOCK_NUMBERS, BLOCK_BYTES = 2**18, 2**23  # of logits and of features in a block, which stays in cache
BLOCK_ROWS = 4096  # in a block at most
MIN_ROWS = 512  # in a block: sums over blocks cost less than products
COLUMNS = 256  # of logits that are looked at together, about: more would not fill products better
SLOW = 3  # steps that gain little, before bfloat16 is given up
PROBES = 1024  # rows that are enough to measure what few weights see
ROUNDING = 1e-5  # times the mean eigenvalue: an l2 that makes nothing of what bfloat16 adds to the Hessian
WIDE = 1024  # features, from which numpy sums up squares sooner than torch
GRAM_ROWS = 4096  # at a time: their sum costs less than their products
LINEAR = 40  # a logit from which log(1 + e^z) is z; e^89 is too large for float32
READ_ROWS = 512  # at most at a time, where they are read from the cache: fresh memory costs more than they do
METRIC_ROWS = 16  # times the width: rows that are enough to measure a metric
MANY_CLASSES = 24  # fill matrix products alone

Values = tuple[Tensor, Tensor, Tensor, Tensor]  # as `value` returns them


@dataclass(frozen=True, eq=False)
class Metric:
    """A weighted covariance of the features: eigenvalues (D,), eigenvectors (D, D) and mean (D,), float64."""

    spectrum: Tensor
    basis: Tensor
    mean: Tensor


@dataclass(frozen=True, eq=False)
class Turn:
    """From rows x as they are stored to the basis of a metric: x @ matrix + shift.

    matrix : (D, D), None for no turn at all
    shift : (D,)
    """

    matrix: Tensor | None
    shift: Tensor

    @classmethod
    def between(cls, stored: Metric | None, metric: Metric, dtype: torch.dtype) -> Turn:
        """Take rows that are stored in the basis of another metric, or None: as they are."""
        if stored is metric:
            return cls(None, torch.zeros_like(metric.mean, dtype=dtype))
        matrix = stored.basis.T @ metric.basis if stored else metric.basis
        mean = metric.mean - stored.mean if stored else metric.mean
        return cls(matrix.to(dtype), -(mean @ metric.basis).to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.shift.dtype

    def vector(self, V: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (L, K, D) and biases (L, K) for rows as they are stored, of those for turned rows."""
        return (V, c) if self.matrix is None else (V @ self.matrix.T, c + V @ self.shift)

    def weights(self, W: Tensor) -> Tensor:
        """Return weights (L, K, D) for turned rows, of those for rows as they are stored."""
        return W.to(self.dtype) if self.matrix is None else W.to(self.dtype) @ self.matrix

    def gradient(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients by weights and biases for turned rows, of those for rows as they are stored."""
        return (W, b) if self.matrix is None else (W @ self.matrix + b[..., None] * self.shift, b)


class Sweeps:
    """The problem's loss without penalty, for L sets of weights (L, K, D) and biases (L, K) at once, float64.

    K = C for classes, 1 for two classes, and the number of labels where y is (N, K) of 0 and 1.
    """

    last: Record | None = None  # of the last `value`, where that is remembered

    def __init__(self, problem: Problem, *, kept_bytes: int = KEPT_BYTES) -> None:
        small = len(problem.X) * problem.X.shape[1] <= SMALL
        self._X = problem.array.astype(np.float64) if small else problem.X
        self.dtype = torch.from_numpy(self._X[:1]).dtype
        self.n, self.width = problem.X.shape
        self.rows = problem.rows
        self._y = torch.from_numpy(problem.y)
        self._labels = self._y[None] if self._y.ndim == 1 else self._y.T  # (K, N) where every logit stands for itself
        self._apart = problem.apart
        self._weights = torch.from_numpy(problem.sample_weight)
        self._kept_bytes = kept_bytes
        self._bytes: int = self.n * self.rows * self.dtype.itemsize
        self._kept: Tensor | None = None  # probabilities (L, K, N) of the last `value`
        self._at: tuple[Tensor, Tensor] | None = None  # and its weights
        self._short = self.dtype  # of what is multiplied where few digits will do
        self._copy: Tensor | None = None  # of the rows, in that
        self._turned: tuple[Metric, Tensor] | None = None  # rows in the basis of a metric, bfloat16
        self._turns: dict[tuple[Metric | None, Metric], Turn] = {}  # to the last metric

    @property
    def most(self) -> int:
        """How many problems can be carried at once, with their probabilities kept."""
        return max(1, self._kept_bytes // self._bytes)

    def value(self, W: Tensor, b: Tensor, *, far: bool = False) -> Values:
        """Return loss (L,), its gradients (L, K, D) and (L, K), and the mean of p (1 - p), (L, K).

        far : bool    from the optimum: few digits will do
        """
        dtype = self._short if far else self.dtype
        many, blank = len(W), not W.any()
        loss, spread = W.new_zeros(many), W.new_zeros(many, self.rows)
        grad_W, grad_b = W.new_zeros(many, self.rows, self.width), W.new_zeros(many, self.rows)
        self._kept, self._at = None, (W, b)
        if many * self._bytes <= self._kept_bytes:
            self._kept = torch.empty(many, self.rows, self.n, dtype=self.dtype)
        weights = self._weights.to(self.dtype)
        parts = [(some, split(W[some], b[some], dtype)) for some in self._together(many)]
        for rows, x in self._blocks(many, dtype):
            weight = weights[rows]
            for some, digits in parts:
                logits = b[some, :, None].repeat(1, 1, len(x)) if blank else logits_of(x, *digits)
                p, each, error = self._answers(logits.to(self.dtype), rows)
                if self._kept is not None:
                    self._kept[some, :, rows] = p
                loss[some] += each @ weight
                spread[some] += p.mul_(1 - p) @ weight
                error = error.mul_(weight)
                grad_W[some] += (error.flatten(0, 1).to(x.dtype) @ x).view_as(grad_W[some])
                grad_b[some] += error.sum(2)
        return loss, grad_W, grad_b, spread

    def value_beside(self, W: Tensor, b: Tensor, beside: Beside | None, allowed: Callable[[float], float]) -> Values:
        """Return what `value` does; `Trail` does with less where something is known beside."""
        return self.value(W, b)

    def curve(
        self, V: Tensor, c: Tensor, which: Tensor, metric: Metric, *, rough: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the Hessian times a vector, at the weights of the last `value`; `which` of its problems are meant.

        V (L, K, D), c (L, K) and what is returned are in the basis of the metric: logits are V basis' (x - mean) + c.

        rough : bool    few digits will do
        """
        turn, dtype, copy = self._rows_for(metric)
        W, b = turn.vector(V, c)
        cut = _round if rough or copy is not None else split

        def times_hessian(x: Tensor, rows: slice, some: slice) -> Tensor:
            along = logits_of(x, *cut(W[some], b[some], dtype)).to(self.dtype)
            p = self._recall(x, rows, which[some])
            if self._apart:
                return along.mul_(p - p * p)
            along -= (p * along).sum(1, keepdim=True)
            return along.mul_(p)

        return turn.gradient(*self._sums(len(W), dtype, copy, times_hessian))

    def middles(self, which: Tensor, metric: Metric) -> Tensor:
        """Return the mean of the rows for each class (L, K, D), each counting with its p (1 - p), in the basis of the metric."""
        turn, dtype, copy = self._rows_for(metric)

        def spread(x: Tensor, rows: slice, some: slice) -> Tensor:
            p = self._recall(x, rows, which[some])
            return p - p * p

        total, count = turn.gradient(*self._sums(len(which), dtype, copy, spread))
        return total / count.clamp_min(torch.finfo(count.dtype).tiny)[..., None]

    def reach(self, W: Tensor, b: Tensor) -> Tensor:
        """Return the squared length of the middles (L, K), about: at W, b, measured on some rows."""
        x, shares = self._probes
        p = self._probable(W, b)
        counts = (p - p * p) * shares
        middles = counts @ x / counts.sum(2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return middles.square().sum(2).double()

    def _probable(self, W: Tensor, b: Tensor) -> Tensor:
        """Return probabilities (L, K, n) of some rows."""
        x, _ = self._probes
        logits = logits_of(x, W.to(x.dtype), b.to(x.dtype))
        return logits.sigmoid() if self._apart else logits.softmax(1)

    def _rows_for(self, metric: Metric) -> tuple[Turn, torch.dtype, Tensor | None]:
        """Return how rows that are at hand are turned into the basis of the metric, their precision, and these rows, if kept."""
        stored, copy = self._turned if self._turned and self._kept is not None else (None, None)
        return self._turn_between(stored, metric), self._short if copy is None else copy.dtype, copy

    def _sums(
        self, many: int, dtype: torch.dtype, copy: Tensor | None, share: Callable[[Tensor, slice, slice], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sum (L, K, D) of rows, each as much as it counts times what share(x, rows, some) gives it; and of that."""
        total = torch.zeros(many, self.rows, self.width, dtype=self.dtype)
        count, weights = torch.zeros(many, self.rows, dtype=self.dtype), self._weights.to(self.dtype)
        for rows, x in self._blocks(many, dtype, copy):
            for some in self._together(many):
                shares = share(x, rows, some).mul_(weights[rows])
                total[some] += (shares.flatten(0, 1).to(x.dtype) @ x).view_as(total[some])
                count[some] += shares.sum(2)
        return total, count

    def turn_to(self, metric: Metric) -> Turn:
        """Return how rows are turned into the basis of a metric."""
        return self._turn_between(None, metric)

    def _turn_between(self, stored: Metric | None, metric: Metric) -> Turn:
        key = stored, metric
        if key not in self._turns:
            self._turns = {pair: turn for pair, turn in self._turns.items() if pair[1] is metric}
            self._turns[key] = Turn.between(stored, metric, self.dtype)
        return self._turns[key]

    def curve_within(self, W: Tensor, b: Tensor, span: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        """Return the Hessian of each class at W, b in a span of weights and bias, measured on some rows.

        Parameters
        ----------
        span : (L, D + 1, r)    in the basis of the metric

        Returns
        -------
        float64 (L, K, r, r), and how many rows of one weight would tell as much (L, K)
        """
        x, shares = self._probes
        p = self._probable(W, b)
        counts = (p - p * p) * shares
        weight, bias = self.turn_to(metric).vector(span[:, :-1].mT, span[:, -1])
        along = x @ weight.mT + bias[:, None]
        found = [torch.stack([(z.T * count) @ z for count in each]) for z, each in zip(along, counts, strict=True)]
        rows = counts.sum(2).square() / counts.square().sum(2).clamp_min(torch.finfo(x.dtype).tiny)
        return torch.stack(found).double(), rows.double()

    @cached_property
    def _probes(self) -> tuple[Tensor, Tensor]:
        """Some rows (n, D), and what each counts (n,), together 1."""
        rows, shares = _draw(self._weights, PROBES)
        return torch.from_numpy(self._X[rows]), shares.to(self.dtype)

    def shorten(self, metric: Metric, least: float, *, turned: bool) -> None:
        """Multiply bfloat16 from now on where few digits will do, if that is quicker.

        For many l2 the rows are turned into the basis of the metric: in that of the features a vector rounded to bfloat16 drowns
        what varies little. For one they are rounded as they are, if it drowns what that adds to the Hessian, and vectors are
        taken as sums of two. Where memory does not hold a copy, many l2 do without, and of one the blocks are rounded as they
        come, to the same numbers.

        least : float    the smallest l2
        """
        fits = self.n * self.width * torch.bfloat16.itemsize <= self._kept_bytes and isinstance(self._X, np.ndarray)
        drowned = ROUNDING * float(metric.spectrum.mean())
        if not ((fits if turned else least > drowned) and has_bfloat16() and self.dtype == torch.float32):
            return
        rows = torch.from_numpy(np.empty((self.n, self.width) if fits else 0, np.int16)).view(torch.bfloat16)
        if not turned:
            self._short, self._copy = torch.bfloat16, rows.copy_(torch.from_numpy(self._X)) if fits else None
            return
        short = least > drowned / self.rows  # the Hessian of each of many classes counts few rows, the penalty more
        mean, basis = metric.mean.to(self.dtype), metric.basis.to(torch.bfloat16 if short else self.dtype)
        for some, x in self._blocks(1):
            rows[some] = (x - mean).to(basis.dtype) @ basis
        self._turned = metric, rows

    def distrust(self, slow: int) -> bool:
        """Do without what is only nearly the Hessian from now on, since steps gain little; return whether that is news.

        slow : int    such steps so far; one or two may lie in the problem
        """
        if slow < SLOW or (self._short == self.dtype and self._turned is None):
            return False
        self._short, self._copy, self._turned = self.dtype, None, None
        return True

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
        if self.n <= 2 * enough:
            counts /= counts.sum()
            size = READ_ROWS if isinstance(self._X, Chunked) else GRAM_ROWS
            parts = [slice(first, first + size) for first in range(0, self.n, size)]
            return _metric(lambda: ((self._read(rows, self.dtype), counts[rows]) for rows in parts), self.width)
        drawn, shares = _draw(counts, enough)
        X = some_of(self._X, drawn)
        return _metric(
            lambda: ((torch.from_numpy(X[rows]).to(self.dtype), shares[rows]) for rows in blocks(X)), self.width
        )

    def level(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and biases without what all classes share, which no probability shows and the optimum lacks."""
        if self._apart:
            return W, b
        return W - W.mean(1, keepdim=True), b - b.mean(1, keepdim=True)

    def noise(self, *, far: bool) -> float:
        """Return how far rounding may move an objective, relative to it."""
        return torch.finfo(self._short if far else self.dtype).eps

    def _together(self, many: int) -> list[slice]:
        """Cut so many problems into those whose logits are looked at together."""
        size = max(1, min(many, COLUMNS // self.rows))
        return [slice(start, min(start + size, many)) for start in range(0, many, size)]

    def _blocks(
        self, many: int, dtype: torch.dtype | None = None, copy: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        most = READ_ROWS if isinstance(self._X, Chunked) else BLOCK_ROWS
        columns = self._together(many)[0].stop * self.rows
        size = min(BLOCK_NUMBERS // columns, BLOCK_BYTES // (self.width * 4))
        size = min(max(size // 64 * 64, MIN_ROWS), most)
        for start in range(0, self.n, size):
            rows = slice(start, min(start + size, self.n))
            yield rows, self._read(rows, dtype or self.dtype) if copy is None else copy[rows]

    def _read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if self._copy is not None and dtype == self._copy.dtype:
            return self._copy[rows]
        return torch.from_numpy(np.ascontiguousarray(self._X[rows])).to(dtype)

    def _answers(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities (L, K, n), the loss of each row (L, n), and the probabilities less the truth.

        What a row is wrong by comes from the small numbers, never from 1 - p, so that rows that are sure count right.
        """
        if self._apart:
            signs = 1 - 2 * self._labels[:, rows].to(logits.dtype)
            against = logits * signs
            return logits.sigmoid(), softplus(against, threshold=LINEAR).sum(1), against.sigmoid_().mul_(signs)
        truth = self._y[rows].expand(len(logits), 1, -1)
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
        return self._answers(logits_of(x, *split(W[which], b[which], x.dtype)).to(self.dtype), rows)[0]


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 faster than float32; older torch does not say."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False)


def _draw(counts: Tensor, most: int) -> tuple[NDArray[np.int64], Tensor]:
    """Return numbers of rows, at most so many, drawn by what they count (N,), and what each counts then (n,), together 1."""
    shares = counts / counts.sum()
    if len(counts) <= most:
        return np.arange(len(counts)), shares
    drawn = np.random.default_rng(0).choice(len(counts), most, p=shares.numpy())
    drawn, times = np.unique(drawn, return_counts=True)
    return drawn, torch.from_numpy(times / most)


def split(W: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return W (L, K, D), b (L, K) in fewer digits; what these cannot hold, if anything, apart: W (2, L, K, D), b (2, L, K)."""
    high, top = W.to(dtype), b.to(dtype)
    low = (W - high).to(dtype)
    return (torch.stack([high, low]), torch.stack([top, (b - top).to(dtype)])) if low.any() else (high, top)


def _round(W: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return W.to(dtype), b.to(dtype)


def logits_of(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return W x + b, (L, K, n), for rows x (n, D) and what `split` returns."""
    found = torch.addmm(b.reshape(-1, 1), W.flatten(0, -2), x.T).view(*b.shape, len(x))
    return found if b.ndim == 2 else found[0].float().add_(found[1])


def _metric(parts: Callable[[], Iterable[tuple[Tensor, Tensor]]], width: int) -> Metric:
    """Return the covariance of rows (n, D) that count (n,), which sum to 1 over all parts; they are gone through twice."""
    mean = torch.zeros(width, dtype=torch.float64)
    for x, counts in parts():
        mean += counts.to(x.dtype) @ x
    gram = torch.zeros(width, width, dtype=torch.float64)
    for x, counts in parts():
        centred = (x - mean.to(x.dtype)).mul_(counts.sqrt().to(x.dtype)[:, None])
        if width < WIDE:
            gram += centred.T @ centred
        else:
            gram += torch.from_numpy(centred.numpy().T @ centred.numpy())  # of one and the same: half of the products
    spectrum, basis = (part.double() for part in torch.linalg.eigh(gram.to(centred.dtype)))
    return Metric(spectrum.clamp_min(0), basis, mean)

"""Sweeps of many classes, which are solved for one l2 after the other: what was found on the way saves products.

Logits are linear in the weights: on a curve through optima they lie on the same curve, and no product is needed. A gradient is
the rows times what each is wrong by. The latter hardly differs from what it is nearby, so that bfloat16 will do for the product
of the difference. How far that is off is measured, along a few random directions in which the product is taken exactly.

Source: Freivalds, Probabilistic machines can use less running time, IFIP 1977 (checking products along random vectors).

>>> trail = Trail(problem)
>>> trail.value(W, b)
>>> trail.value_beside(W, b, Beside([trail.last]), allowed)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embedpipe.heads._sweeps import Metric, Sweeps, Values, logits_of, split

if TYPE_CHECKING:
    from embedpipe.heads._entries import Entries

KNOWN = 3  # optima that are known beside a point, at most
RECORDS = 2 * (KNOWN + 3)  # of a number for each row and class that memory must hold: of optima, and points on the way
SAMPLE, SIDE_BY_SIDE = 2**17, 32  # pairs of row and class, about, by which a blend is chosen; as the memory gives them
SAMPLE_ROWS = 256  # on which few digits are tried
CAUTION = 0.01  # of the error that is allowed, for what is judged by these
TESTS = 16  # directions
LARGE = 2**30  # products in a sweep, from which the pairs that count are looked for
CHUNK = 128  # of which the width is a multiple then


@dataclass(frozen=True, eq=False)
class Record:
    """Of one point: logits and what each row is wrong by, times its weight (K, N); the gradient (K, D) and the loss.

    exact : bool    the logits are a product of their own, and may be added up again
    """

    logits: Tensor
    error: Tensor
    gradient: Tensor
    loss: float
    exact: bool


@dataclass(frozen=True, eq=False)
class Beside:
    """Records of points nearby.

    shares : of each record in the weights that are looked at, where these lie on a curve through them
    """

    records: Sequence[Record]
    shares: Sequence[float] | None = None

    @property
    def on_curve(self) -> bool:
        """Whether logits follow from those of the records. Once: errors would grow along the way."""
        return self.shares is not None and all(record.exact for record in self.records)

    def logits(self, rows: slice) -> Tensor:
        """Return the logits (K, n) of weights that lie on the curve."""
        assert self.shares is not None
        return _sum([record.logits[:, rows] for record in self.records], self.shares)

    def blend(self, error: Tensor) -> tuple[float, ...]:
        """Return the shares of the records that come nearest to what rows are wrong by (K, N), judged by some rows."""
        near = torch.stack([_some(record.error) for record in self.records]).double()
        squares = near @ near.T
        squares += (1e-12 * squares.diagonal() + torch.finfo(squares.dtype).tiny).diag()
        return tuple(torch.linalg.solve(squares, near @ _some(error).double()).tolist())


class Trail(Sweeps):
    """Sweeps that remember the last one, where there is room for that, and bfloat16."""

    _reach: Tensor | None = None  # of the last middles
    _long = False  # once logits of few digits have been seen not to do: l2 falls
    _few: tuple[Tensor, Entries | None] | None = None  # pairs that count, of the probabilities that are kept

    def value(self, W: Tensor, b: Tensor, *, far: bool = False) -> Values:
        if len(W) == 1 and self._turned and RECORDS * self._bytes <= self._kept_bytes:
            return self.value_beside(W, b, None, lambda _: 0.0)
        self.last = None
        return super().value(W, b, far=far)

    def value_beside(self, W: Tensor, b: Tensor, beside: Beside | None, allowed: Callable[[float], float]) -> Values:
        """Return what `value` does, of one problem, with the help of what is known beside it.

        allowed : loss -> float    how far the gradient may be off, squared
        """
        weights, spread, grad_b = self._weights.to(self.dtype), W.new_zeros(1, self.rows), W.new_zeros(1, self.rows)
        logits, error = (torch.empty(self.rows, self.n, dtype=self.dtype) for _ in range(2))
        self._kept, self._at, loss = torch.empty(1, self.rows, self.n, dtype=self.dtype), (W, b), 0.0
        on_curve = beside is not None and beside.on_curve
        short = None if beside is None or on_curve else self._short_weights(W, b, allowed(beside.records[-1].loss / 2))
        for rows, z in self._logits(W, b, beside if on_curve else None, short):
            logits[:, rows] = z[0]
            p, each, wrong = self._answers(z, rows)
            self._kept[:, :, rows] = p
            loss += float(each[0] @ weights[rows])
            spread += p.mul_(1 - p) @ weights[rows]
            error[:, rows] = wrong[0].mul_(weights[rows])
            grad_b += wrong.sum(2)
        gradient = self._gradient_beside(error, beside, allowed(loss)) if beside else None
        if gradient is None:
            gradient = self._gradient(error)
        self.last = Record(logits, error, gradient, loss, exact=not on_curve and short is None)
        return W.new_tensor([loss]), gradient[None], grad_b, spread

    def _logits(
        self, W: Tensor, b: Tensor, beside: Beside | None, short: tuple[Tensor, Tensor] | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield logits (1, K, n) of all rows, by blocks: from what is known beside them, or by bfloat16, or in full."""
        if beside:
            for rows, _ in self._blocks(1):
                yield rows, beside.logits(rows)[None]
        elif short:
            assert self._turned
            for rows, x in self._blocks(1, copy=self._turned[1]):
                yield rows, (short[0] @ x.T).to(self.dtype)[None] + short[1][:, None]
        else:
            parts = split(W, b, self.dtype)
            for rows, x in self._blocks(1):
                yield rows, logits_of(x, *parts)

    def _short_weights(self, W: Tensor, b: Tensor, allowed: float) -> tuple[Tensor, Tensor] | None:
        """Return bfloat16 weights (K, D) and biases (K,) for turned rows, if their logits leave the gradient as it is.

        Some rows tell: their p (1 - p) times how far logits are off is what gradients are off by.
        """
        assert self._turned
        if self._long:
            return None
        metric, copy = self._turned
        V, c = (W[0].to(self.dtype) @ metric.basis.to(self.dtype)).bfloat16(), (b + W @ metric.mean)[0].to(self.dtype)
        some = slice(None, None, max(1, self.n // SAMPLE_ROWS))
        exact = logits_of(torch.from_numpy(self._X[some]), W.to(self.dtype), b.to(self.dtype))[0]
        p = exact.sigmoid() if self._apart else exact.softmax(0)
        off = (
            (p - p * p) * self._weights[some].to(self.dtype) * ((V @ copy[some].T).to(self.dtype) + c[:, None] - exact)
        )
        squared = float(off.square().sum()) * self.n / off.shape[1] * float(metric.spectrum.sum())
        self._long = squared > CAUTION * allowed
        return None if self._long else (V, c)

    def _gradient(self, error: Tensor) -> Tensor:
        """Return the gradient (K, D), float64, of what rows are wrong by (K, N)."""
        total = torch.zeros(self.rows, self.width, dtype=torch.float64)
        for rows, x in self._blocks(1):
            total += error[:, rows] @ x
        return total

    def _gradient_beside(self, error: Tensor, beside: Beside, allowed: float) -> Tensor | None:
        """Return it by the difference to what is known, if it is not too far off, squared."""
        assert self._turned
        metric, copy = self._turned
        total, change = torch.zeros(self.rows, self.width, dtype=self.dtype), torch.zeros(self.rows, dtype=self.dtype)
        shares = beside.blend(error)
        for rows, x in self._blocks(1, copy=copy):
            apart = error[:, rows] - _sum([record.error[:, rows] for record in beside.records], shares)
            total += apart.to(x.dtype) @ x
            change += apart.sum(1)
        turned_back = (total @ metric.basis.to(self.dtype).T).double() + change.double()[:, None] * metric.mean
        gradient = _sum([record.gradient for record in beside.records], shares) + turned_back
        directions, along = self._tests
        off = (error @ along).double() - gradient @ directions
        return gradient if float(off.square().sum()) / directions.shape[1] <= allowed else None

    @cached_property
    def _tests(self) -> tuple[Tensor, Tensor]:
        """Random directions (D, n), and the rows along them (N, n)."""
        directions = torch.randn(self.width, TESTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        along = torch.cat([x @ directions.to(self.dtype) for _, x in self._blocks(1)])
        return directions, along

    def curve(
        self, V: Tensor, c: Tensor, which: Tensor, metric: Metric, *, rough: bool = False
    ) -> tuple[Tensor, Tensor]:
        if entries := self._entries(metric):
            hess_V, hess_c = entries.curve(V[0], c[0], metric.spectrum.to(self.dtype))
            return hess_V[None], hess_c[None]
        return super().curve(V, c, which, metric, rough=rough)

    def middles(self, which: Tensor, metric: Metric) -> Tensor:
        entries = self._entries(metric)
        found = entries.middles()[None] if entries else super().middles(which, metric)
        self._reach = found.square().sum(2).double()
        return found

    def reach(self, W: Tensor, b: Tensor) -> Tensor:
        """Return that of the middles when last measured, 0 before: it counts where the penalty is small, late on a path."""
        return torch.zeros_like(b) if self._reach is None else self._reach.expand_as(b).clone()

    def _entries(self, metric: Metric) -> Entries | None:
        """Return the pairs of a row and a class that make up nearly all of the Hessian, where they are few, and worth it."""
        if self._kept is None or len(self._kept) > 1 or not self._turned or self._turned[0] is not metric:
            return None
        if self._compiled and (self._few is None or self._few[0] is not self._kept):
            weights = self._weights.to(self.dtype)
            found = self._compiled.of(self._kept[0], weights, self._turned[1], apart=self._apart)
            self._few = self._kept, found
        return self._few[1] if self._few else None

    def distrust(self, slow: int) -> bool:
        counted = bool(self._few and self._few[1])
        if counted:
            self._compiled, self._few = None, None
        return counted or super().distrust(slow)

    @cached_property
    def _compiled(self) -> type[Entries] | None:
        """What counts with few pairs; numba is an extra, and takes a while to load."""
        if self.n * self.width * self.rows >= LARGE and self.width % CHUNK == 0:
            with suppress(ImportError, RuntimeError):  # numba is not installed, or has nowhere to keep what it compiles
                from embedpipe.heads._entries import Entries

                return Entries
        return None


def _some(error: Tensor) -> Tensor:
    """Return about SAMPLE of the numbers (K, N), from runs of SIDE_BY_SIDE along rows."""
    n = error.shape[1] // SIDE_BY_SIDE * SIDE_BY_SIDE
    step = max(1, error.numel() // SAMPLE)
    return error[:, :n].reshape(-1, SIDE_BY_SIDE)[::step].flatten() if n else error.flatten()


def _sum(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = parts[0] * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total.add_(part, alpha=share)
    return total

"""Entries: a Hessian of many classes from the few pairs of a row and a class that make up nearly all of it.

With a small l2 most rows are sure of most classes. What the pairs left out would add is taken as the covariance of all rows, as
much of it as their p (1 - p). Rows are bfloat16; products and sums are float32. The loops are compiled, once a machine.

>>> entries = Entries.of(p, weights, rows, apart=False)
>>> hess_V, hess_c = entries.curve(V, c, spectrum)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedpipe.compiling import BYTES, LANES, Memory, compiled, inlined
from embedpipe.heads._trail import CHUNK

KEPT = 0.98  # of all p (1 - p)
MOST = 0.35  # of all pairs, from which matrix products of all of them are quicker
SPARE = 0.1  # of all pairs, room beyond these: a sample tells how many there are
SAMPLE = 2**16  # pairs, about, that tell where to cut
BLOCK_BYTES = 2**19  # of rows at a time, which the cache holds
TOGETHER = 4  # rows
PAIR = 2 * LANES  # bfloat16 in a vector, of which float32 takes two: the even ones and the odd ones
STEP = BYTES * LANES
HALF = CHUNK * 2  # bytes of as many bfloat16

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
LIST, ROWS, MATRIX = "float32[::1]", "int32[:,::1]", "float32[:,::1]"
PLACES = "int64[::1], int32[::1]"


@dataclass(frozen=True, eq=False)
class Entries:
    """Pairs of a row and a class, by blocks of rows and then by class, filled up to TOGETHER with pairs that count nothing.

    starts : int64 (blocks * K + 1,)
    members : int32 (n,)             rows
    p : float32 (n,)
    left : float32 (K,)              the mean of p (1 - p) of pairs that are not there
    """

    rows: Tensor
    weights: Float32
    starts: Int64
    members: Int32
    p: Float32
    left: Tensor
    apart: bool

    @classmethod
    def of(cls, p: Tensor, weights: Tensor, rows: Tensor, *, apart: bool) -> Entries | None:
        """Choose the pairs, or return None where they are too many.

        p : float32 (K, N)
        weights : float32 (N,)      sum to 1
        rows : bfloat16 (N, D)      D is a multiple of CHUNK
        apart : bool                every class is a question of its own
        """
        counts = _counts(p, weights)[:: max(1, p.numel() // SAMPLE)].sort(descending=True).values
        place = int((counts.cumsum(0) < KEPT * counts.sum()).sum().clamp(max=len(counts) - 1))
        if place >= MOST * len(counts):
            return None
        n_classes, n = p.shape
        size = max(TOGETHER, BLOCK_BYTES // (2 * rows.shape[1]))
        places = n_classes * -(-n // size)
        room = int((MOST + SPARE) * p.numel()) + places * TOGETHER
        starts, members, kept = np.zeros(places + 1, np.int64), np.empty(room, np.int32), np.empty(room, np.float32)
        spread = np.zeros(n_classes, np.float32)
        choose(p.numpy(), weights.numpy(), float(counts[place]), size, starts, members, kept, spread)
        if starts[-1] > room - TOGETHER:
            return None
        some = slice(0, starts[-1])
        whole = (p - p * p) @ weights
        left = (whole - torch.from_numpy(spread)).clamp_min(0)
        if left.sum() > 2 * (1 - KEPT) * whole.sum():  # the sample told wrong
            return None
        return cls(rows, weights.numpy(), starts, members[some], kept[some], left, apart)

    def curve(self, V: Tensor, c: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Hessian times a vector (K, D), (K,); spectrum (D,) is the covariance of all rows, on whose basis V lies."""
        hess_V, hess_c = torch.zeros_like(V), self.left * c
        sums = np.zeros(len(self.weights), np.float32)
        numbers = self._numbers, self.weights, self.starts, self.members, self.p
        multiply(*numbers, _apart(V).numpy(), c.numpy(), self.apart, sums, hess_V.numpy(), hess_c.numpy())
        return _joined(hess_V) + self.left[:, None] * spectrum * V, hess_c

    def middles(self) -> Tensor:
        """Return the mean of the rows for each class (K, D), each counting with its p (1 - p)."""
        total, count = torch.zeros(len(self.left), self.rows.shape[1]), torch.zeros(len(self.left))
        add_up(self._numbers, self.weights, self.starts, self.members, self.p, total.numpy(), count.numpy())
        return _joined(total) / (count + self.left).clamp_min(torch.finfo(count.dtype).tiny)[:, None]

    @property
    def _numbers(self) -> Int32:
        """The rows as they lie in memory, two numbers at a time."""
        return self.rows.view(torch.int32).numpy()


def _counts(p: Tensor, weights: Tensor) -> Tensor:
    return ((p - p * p) * weights).flatten()


def _apart(V: Tensor) -> Tensor:
    """Return V (K, D) with the even numbers of every PAIR before the odd ones."""
    return V.view(len(V), -1, LANES, 2).transpose(2, 3).reshape(V.shape)


def _joined(V: Tensor) -> Tensor:
    return V.view(len(V), -1, 2, LANES).transpose(2, 3).reshape(V.shape)


@inlined
def _multiply_four(memory: Memory, first: Any, second: Any, third: Any, fourth: Any, vector: Any, sums: Any) -> None:
    """Add to four sums, each of LANES numbers, a CHUNK of four rows times a vector."""
    rows = first, second, third, fourth
    found = [memory[sums, (number, STEP)] for number in range(TOGETHER)]
    for part in range(CHUNK // PAIR):
        even, odd = memory[vector, (2 * part, STEP)], memory[vector, (2 * part + 1, STEP)]
        for number, row in enumerate(rows):
            halves = memory.halves((row, (part, STEP)))
            found[number] = found[number] + halves[0] * even + halves[1] * odd
    for number, total in enumerate(found):
        memory[sums, (number, STEP)] = total


@inlined
def _add_four(memory: Memory, first: Any, second: Any, third: Any, fourth: Any, shares: Any, total: Any) -> None:
    """Add to a CHUNK of numbers those of four rows, each times its share."""
    rows = first, second, third, fourth
    each = [memory.all((shares, (number, BYTES))) for number in range(TOGETHER)]
    for part in range(CHUNK // PAIR):
        even, odd = memory[total, (2 * part, STEP)], memory[total, (2 * part + 1, STEP)]
        for row, share in zip(rows, each, strict=True):
            halves = memory.halves((row, (part, STEP)))
            even, odd = even + halves[0] * share, odd + halves[1] * share
        memory[total, (2 * part, STEP)], memory[total, (2 * part + 1, STEP)] = even, odd


@compiled(f"void({MATRIX}, {LIST}, float64, int64, {PLACES}, {LIST}, {LIST})")
def choose(
    p: Float32, weights: Float32, least: float, size: int, starts: Int64, members: Int32, kept: Float32, spread: Float32
) -> None:
    """Fill starts, members and p with the pairs that count more than `least`, and the spread (K,) with what they count.

    Stops where there is no more room: the last start then is at the end of it.
    """
    place, found = 0, 0
    for first in range(0, len(weights), size):
        last = min(first + size, len(weights))
        for k in range(len(p)):
            starts[place] = found
            place += 1
            if found + (last - first) + TOGETHER > len(members):
                starts[-1] = len(members)
                return
            for row in range(first, last):
                share = p[k, row]
                count = weights[row] * (share - share * share)
                if count > least:
                    members[found], kept[found] = row, share
                    spread[k] += count
                    found += 1
            while found % TOGETHER:
                members[found], kept[found] = first, 0
                found += 1
    starts[-1] = found


@compiled(f"void({ROWS}, int32[::1], int64, int64, {LIST}, {LIST})")
def _spread_out(rows: Int32, members: Int32, start: int, end: int, shares: Float32, total: Float32) -> None:
    """Add rows, each times its share, to a total (D,)."""
    width, target, given = rows.shape[1] * BYTES, total.ctypes.data, shares.ctypes.data
    base = rows.ctypes.data
    for e in range(start, end, TOGETHER):
        first, second = base + members[e] * width, base + members[e + 1] * width
        third, fourth = base + members[e + 2] * width, base + members[e + 3] * width
        for at in range(0, width, HALF):
            _add_four(first + at, second + at, third + at, fourth + at, given + (e - start) * BYTES, target + 2 * at)


@compiled(f"void({ROWS}, {LIST}, {PLACES}, {LIST}, {MATRIX}, {LIST}, boolean, {LIST}, {MATRIX}, {LIST})")
def multiply(
    rows: Int32,
    weights: Float32,
    starts: Int64,
    members: Int32,
    p: Float32,
    V: Float32,
    c: Float32,
    apart: bool,
    sums: Float32,
    hess_V: Float32,
    hess_c: Float32,
) -> None:
    """Add the Hessian of the pairs times V (K, D), c (K,) to hess_V and hess_c; sums (N,) are 0.

    V and hess_V have the even numbers of every PAIR before the odd ones.
    """
    n_classes, width, base = len(V), rows.shape[1] * BYTES, rows.ctypes.data
    lanes = np.empty((TOGETHER, LANES), np.float32)
    held = lanes.ctypes.data
    most = 0
    for block in range((len(starts) - 1) // n_classes):
        most = max(most, starts[(block + 1) * n_classes] - starts[block * n_classes])
    along = np.empty(most, np.float32)
    for block in range((len(starts) - 1) // n_classes):
        begin = starts[block * n_classes]
        for k in range(n_classes):
            vector = V[k].ctypes.data
            for e in range(starts[block * n_classes + k], starts[block * n_classes + k + 1], TOGETHER):
                first, second = base + members[e] * width, base + members[e + 1] * width
                third, fourth = base + members[e + 2] * width, base + members[e + 3] * width
                lanes[:] = 0
                for at in range(0, width, HALF):
                    _multiply_four(first + at, second + at, third + at, fourth + at, vector + 2 * at, held)
                for number in range(TOGETHER):
                    found = lanes[number].sum() + c[k]
                    along[e - begin + number] = found
                    sums[members[e + number]] += p[e + number] * found
        for k in range(n_classes):
            start, end = starts[block * n_classes + k], starts[block * n_classes + k + 1]
            for e in range(start, end):
                less = p[e] * along[e - begin] if apart else sums[members[e]]
                share = weights[members[e]] * p[e] * (along[e - begin] - less)
                along[e - begin] = share
                hess_c[k] += share
            _spread_out(rows, members, start, end, along[start - begin :], hess_V[k])


@compiled(f"void({ROWS}, {LIST}, {PLACES}, {LIST}, {MATRIX}, {LIST})")
def add_up(
    rows: Int32, weights: Float32, starts: Int64, members: Int32, p: Float32, total: Float32, count: Float32
) -> None:
    """Add up the rows of the pairs for each class (K, D), as much as they count, and what they count (K,)."""
    shares = np.empty(len(members), np.float32)
    for e in range(len(members)):
        shares[e] = weights[members[e]] * (p[e] - p[e] * p[e])
    n_classes = len(total)
    for place in range(len(starts) - 1):
        start, end, k = starts[place], starts[place + 1], place % n_classes
        for e in range(start, end):
            count[k] += shares[e]
        _spread_out(rows, members, start, end, shares[start:], total[k])

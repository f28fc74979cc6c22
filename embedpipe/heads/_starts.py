"""Where a minimisation starts: on a curve through the optima of the l2 around it.

With a small l2 the weights lie near a polynomial in log l2. With a large one they do not: the penalty then takes from each
direction what the features vary little in. For least squares that is known, weights = c / (eigenvalue + l2) in the basis of
their covariance, and c does not depend on l2; here an eigenvalue counts with the mean of p (1 - p), and c lies near a polynomial.

Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 3.4.1 (ridge regression in the eigenbasis).

>>> solved = Solved(metric, torch.float32)
>>> solved.add(1e-2, W, b, spread)
>>> W, b, beside = solved.start(5e-3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedpipe.heads._sweeps import Metric
from embedpipe.heads._trail import KNOWN, Beside, Record

SAME = 1e-6  # a distance in log l2 that makes no difference
REACH, SIDE, BEFORE = 3.5, 4, KNOWN  # of a curve: in log l2; known points to each side; before, where none are after


@dataclass(frozen=True, eq=False)
class _Optimum:
    """Float64 weights (K, D) and bias (K,) at one l2; spread is the mean of p (1 - p)."""

    l2: float
    W: Tensor
    b: Tensor
    spread: float
    record: Record | None

    @property
    def penalty(self) -> float:
        """The eigenvalue that counts as much as l2."""
        return self.l2 / self.spread


class Solved:
    """The optima found so far, l2 falling."""

    def __init__(self, metric: Metric, dtype: torch.dtype) -> None:
        """Take the metric in whose basis penalties are weighed, and the digits that weights need there."""
        self._all: list[_Optimum] = []
        self._basis, self._spectrum = metric.basis.to(dtype), metric.spectrum.to(dtype)
        self._middle = float(metric.spectrum.mean())
        self._free: dict[float, Tensor] = {}  # by l2, of those whose penalty is large: c (K, D)

    def __len__(self) -> int:
        return len(self._all)

    def add(self, l2: float, W: Tensor, b: Tensor, spread: float, record: Record | None = None) -> None:
        found = _Optimum(l2, W, b, spread, record)
        self._all = [one for one in self._all if abs(math.log(one.l2 / l2)) > SAME]
        self._all.append(found)
        self._all.sort(key=lambda one: -one.l2)
        for number, old in enumerate(self._all[:-KNOWN]):
            self._all[number] = replace(old, record=None)
        if found.penalty > self._middle:
            self._free[l2] = W.to(self._basis.dtype) @ self._basis * (self._spectrum + found.penalty)

    def start(self, l2: float) -> tuple[Tensor, Tensor, Beside | None]:
        """Return weights (1, K, D), bias (1, K), and what is known beside them."""
        near, shares = self._near(l2)
        b = _along([one.b for one in near], shares)
        records = [one.record for one in near if one.record]
        penalty = l2 / math.exp(sum(share * math.log(one.spread) for one, share in zip(near, shares, strict=True)))
        if least_squares := penalty > self._middle and all(one.l2 in self._free for one in near):
            free = _along([self._free[one.l2] for one in near], shares)
            W = (free / (self._spectrum + penalty) @ self._basis.T).double()
        else:
            W = _along([one.W for one in near], shares)
        beside = Beside(records, None if least_squares else shares) if len(records) == len(near) else None
        return W[None], b[None], beside

    def _near(self, l2: float) -> tuple[list[_Optimum], list[float]]:
        """Return the optima that a curve goes through, and the share of each.

        As many to each side; beyond the last, the last ones; where these are far, the last alone.
        """
        away = [math.log(one.l2 / l2) for one in self._all]
        same = [one for one, distance in zip(self._all, away, strict=True) if abs(distance) <= SAME]
        if same:
            return same, [1.0]
        before = [number for number, distance in enumerate(away) if distance > 0]
        after = [number for number, distance in enumerate(away) if distance <= 0]
        side = min(len(before), len(after), SIDE - 1) + 1
        near = [*before[-side:], *after[:side]] if before and after else [*before[-BEFORE:], *after[:1]]
        least = [*before[-2:], *after[:2]] if before and after else [*before[-1:], *after[:1]]
        near = [number for number in near if number in least or abs(away[number]) <= REACH]
        shares = _lagrange(np.array([away[number] for number in near]))
        return [self._all[number] for number in near], shares.tolist()


def _lagrange(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the value at each place in the polynomial through them, at 0."""
    apart, towards = places[:, None] - places, np.repeat(-places[None], len(places), axis=0)
    np.fill_diagonal(apart, 1.0)
    np.fill_diagonal(towards, 1.0)
    return np.asarray((towards / apart).prod(axis=1))


def _along(values: list[Tensor], shares: list[float]) -> Tensor:
    """Return the sum of so much of each."""
    total: Tensor = torch.tensordot(torch.tensor(shares, dtype=values[0].dtype), torch.stack(values), 1)
    return total

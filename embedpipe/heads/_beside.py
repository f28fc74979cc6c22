"""What sweeps found at points nearby, from which a sweep at another one follows with fewer products.

Logits are linear in the weights: on a curve through optima they lie on the same curve, and no product is needed. A gradient is
the rows times what each is wrong by. The latter hardly differs from what it is nearby, so that bfloat16 will do for the product
of the difference. How far that is off is measured, on a few random directions in which the product is taken exactly.

Source: Freivalds, Probabilistic machines can use less running time, IFIP 1977 (checking products on random vectors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 2**17  # pairs of row and class, about


@dataclass(frozen=True, eq=False)
class Record:
    """Of one problem at one point: logits and what each row is wrong by, times its weight (K, N); the gradient (K, D)."""

    logits: Tensor
    error: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class Beside:
    """Records of points nearby.

    shares : of each record in the weights that are looked at, where these lie on a curve through them
    """

    records: Sequence[Record]
    shares: Sequence[float] | None = None

    def logits(self, rows: slice) -> Tensor:
        """Return the logits (K, n) of weights that lie on the curve."""
        assert self.shares is not None
        return _sum([record.logits[:, rows] for record in self.records], self.shares)

    def blend(self, error: Tensor) -> Blend:
        """Return the records in those shares that come nearest to what rows are wrong by (K, N), judged by some rows."""
        step = max(1, error.numel() // SAMPLE)
        near = torch.stack([record.error.flatten()[::step] for record in self.records]).double()
        found = torch.linalg.lstsq(near.T, error.flatten()[::step, None].double()).solution
        return Blend(self.records, found[:, 0].tolist())


@dataclass(frozen=True, eq=False)
class Blend:
    """So much of each record."""

    records: Sequence[Record]
    shares: Sequence[float]

    def error(self, rows: slice) -> Tensor:
        return _sum([record.error[:, rows] for record in self.records], self.shares)

    @property
    def gradient(self) -> Tensor:
        return _sum([record.gradient for record in self.records], self.shares)


def _sum(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = parts[0] * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total.add_(part, alpha=share)
    return total

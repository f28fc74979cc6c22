"""Gram: all that least squares asks of some rows, as sums: those of a part are those of the whole less those of the rest.

>>> whole, held = Gram.of(X, y, 10), Gram.of(X[:100], y[:100], 10, origin=whole.origin)
>>> (whole - held).count == len(X) - 100
True
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from embedpipe.heads._problem import Chunked, Float32, Float64, Int64, Moments, blocks


@dataclass(frozen=True, eq=False)
class Gram:
    """Sums over rows of z = (x - origin, one-hot class), float64 (D + C,): how many, their sum, and that of z z'.

    origin : float64 (D,)    near the middle of the rows, so that little cancels
    """

    origin: Float64
    count: int
    total: Float64
    products: Float64

    @classmethod
    def of(cls, X: Float32 | Chunked, y: Int64, n_classes: int, origin: Float64 | None = None) -> Gram:
        """Sum up features (N, D) and class indices (N,); the origin is that of the Gram to subtract from, else the mean."""
        width = X.shape[1]
        if origin is None:
            origin = sum((X[rows].sum(axis=0, dtype=np.float64) for rows in blocks(X)), np.zeros(width)) / max(
                1, len(X)
            )
        total, products = np.zeros(width + n_classes), np.zeros((width + n_classes, width + n_classes))
        for rows in blocks(X):
            z = np.hstack([X[rows] - origin, np.eye(n_classes)[y[rows]]])
            total += z.sum(axis=0)
            products += z.T @ z
        return cls(origin, len(X), total, products)

    def __sub__(self, part: Gram) -> Gram:
        """Return the sums over the other rows; both have one origin."""
        count, total, products = self.count - part.count, self.total - part.total, self.products - part.products
        return replace(self, count=count, total=total, products=products)

    def moments(self, mean: NDArray[np.floating], inverse: NDArray[np.floating], present: Int64) -> Moments:
        """Return the moments of features (x - mean) * inverse, and of the targets of the classes that are present."""
        width = len(self.origin)
        middle, share = self.total[:width] / self.count, self.total[width:][present] / self.count
        covariance = (
            (self.products[:width, :width] / self.count - np.outer(middle, middle)) * inverse * inverse[:, None]
        )
        across = self.products[:width, width:][:, present] / self.count - np.outer(middle, share)
        across = 2 * across[:, 1:] if len(present) == 2 else across
        return Moments((middle + self.origin - mean) * inverse, covariance, across * inverse[:, None])

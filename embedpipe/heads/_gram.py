"""Gram: sums over rows that least squares needs; those of a subset are those of all rows minus those of the rest.

>>> whole = Gram.from_rows(X, y, 10)
>>> part = Gram.from_rows(X[:100], y[:100], 10, origin=whole.origin)
>>> (whole - part).count == len(X) - 100
True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedpipe.heads._problem import Features, Float64, Int64, blocks, feature_means


@dataclass(frozen=True, eq=False)
class Gram:
    """Sums over rows of z = (x - origin, one-hot class), float64 (D + C,).

    Parameters
    ----------
    origin : float64 (D,)               near the mean of the rows, against cancellation
    count : int                         number of rows
    total : float64 (D + C,)            sum of z
    products : float64 (D + C, D + C)   sum of z z'
    """

    origin: Float64
    count: int
    total: Float64
    products: Float64

    @classmethod
    def from_rows(cls, X: Features, y: Int64, n_classes: int, origin: Float64 | None = None) -> Gram:
        """Sum over features (N, D) and class indices (N,); Grams to be subtracted need one origin, by default the mean."""
        width = X.shape[1]
        origin = feature_means(X) if origin is None else origin
        total, products = np.zeros(width + n_classes), np.zeros((width + n_classes, width + n_classes))
        for rows in blocks(X):
            z = np.hstack([X[rows] - origin, np.eye(n_classes)[y[rows]]])
            total += z.sum(axis=0)
            products += z.T @ z
        return cls(origin, len(X), total, products)

    def __sub__(self, part: Gram) -> Gram:
        """Return the sums over the rows that are not in `part`, which has the same origin."""
        return Gram(self.origin, self.count - part.count, self.total - part.total, self.products - part.products)

    def moments(
        self, mean: NDArray[np.floating], inverse: NDArray[np.floating], present: Int64
    ) -> tuple[Float64, Float64, Float64]:
        """Return mean and covariance of features (x - mean) * inverse, and their covariance with targets of these classes."""
        width = len(self.origin)
        centre, share = self.total[:width] / self.count, self.total[width:][present] / self.count
        covariance = self.products[:width, :width] / self.count - np.outer(centre, centre)
        cross = self.products[:width, width:][:, present] / self.count - np.outer(centre, share)
        cross = 2 * cross[:, 1:] if len(present) == 2 else cross
        scaled = covariance * inverse * inverse[:, None]
        return (centre + self.origin - mean) * inverse, scaled, cross * inverse[:, None]

"""Nearest neighbours by cosine in blocks of bounded memory, near copies and outliers.

A fixed similarity cannot separate near copies from different images, because the similarity of different images depends on
the backbone and the data. The neighbourhood can: around a point of m-dimensional data, the distances to the nearest and to
the k-th nearest of n others satisfy

    P(first < r * kth) = 1 - (1 - r^m)^(k - 1)

for any density (r^m is a volume fraction, and k - 1 points are uniform in the ball of the k-th). The dimension m is estimated
from the median of first / kth, which a few near copies hardly change. A row is a copy if its ratio is so small that
`FALSE_ALARMS` such rows are expected by chance in the whole search.

>>> X = unit_rows(features - features.mean(axis=0))
>>> typical = find_neighbours(X, X, own=np.arange(len(X)))
>>> copies = find_neighbours(Q, X).copies(copy_ratio(typical, len(Q)))

Source: Levina, Bickel, NIPS 2004, for distances in a ball; Facco et al., Scientific Reports 7 (2017), for ratios.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

K = 10  # the neighbour that sets the scale: up to K - 1 copies of one image do not hide each other
MIN_ROWS = 2 * K  # fewer rows give no scale
FALSE_ALARMS = 0.05  # expected number per search
MAX_RATIO = 0.5  # in any dimension, a copy is at least twice as near as the k-th neighbour
ROUNDING = 2e-3  # chord between rows that differ by rounding only
OUTLIER_SCORE = 3.5  # robust standard deviations from the median
STD_PER_MAD = 1.4826  # of a normal distribution
BLOCK_BYTES = 64 << 20  # of similarities in memory at a time


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest row of each query, and the distances of the nearest and the k-th nearest row.

    nearest : int64 (n,)          row of the base
    first, kth : float64 (n,)     chord between unit rows, sqrt(2 - 2 cosine), in [0, 2]
    """

    nearest: Int64
    first: Float64
    kth: Float64

    @property
    def similarity(self) -> Float64:
        """Cosine to the nearest row, float64 (n,)."""
        return np.asarray(1 - self.first**2 / 2)

    def copies(self, ratio: float) -> NDArray[np.bool_]:
        """Return whether each query is a copy of its nearest row, bool (n,)."""
        return np.asarray((self.first <= ROUNDING) | (self.first < ratio * self.kth))

    def pairs(self, ratio: float) -> Iterator[tuple[int, int, float]]:
        """Yield each pair of copies once, with its cosine; the queries must be the base itself."""
        is_copy, similarity = self.copies(ratio), self.similarity
        for row in np.flatnonzero(is_copy).tolist():
            twin = int(self.nearest[row])
            if twin < row or not is_copy[twin]:
                yield row, twin, float(similarity[row])


def find_neighbours(queries: Float32, base: Float32, *, own: Int64 | None = None) -> Neighbours:
    """Find the nearest base row of each query; all rows have unit length.

    Parameters
    ----------
    queries : float32 (n, D)
    base : float32 (N, D)          N > K
    own : int64 (n,), optional     base row of each query itself, which is left out
    """
    nearest = np.empty(len(queries), np.int64)
    cosines = np.empty((len(queries), 2))
    step = max(1, BLOCK_BYTES // (base.itemsize * max(1, len(base))))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        cosine = queries[rows] @ base.T
        if own is not None:
            cosine[np.arange(len(cosine)), own[rows]] = -2
        nearest[rows] = cosine.argmax(axis=1)
        cosine.partition(len(base) - K, axis=1)
        cosines[rows] = np.stack([cosine[:, len(base) - K :].max(axis=1), cosine[:, len(base) - K]], axis=1)
    chords = np.sqrt(np.maximum(0, 2 - 2 * cosines))
    return Neighbours(nearest, chords[:, 0], chords[:, 1])


def kth_distance(X: Float32) -> Float64:
    """Return the Euclidean distance of each row to its k-th nearest other row, float64 (n,), for X (n, D), n > K."""
    squares = np.einsum("nd,nd->n", X, X)
    distance = np.empty(len(X))
    step = max(1, BLOCK_BYTES // (X.itemsize * max(1, len(X))))
    for start in range(0, len(X), step):
        rows = slice(start, start + step)
        square = squares[rows, None] + squares - 2 * (X[rows] @ X.T)
        square[np.arange(len(square)), np.arange(start, start + len(square))] = np.inf
        distance[rows] = np.partition(square, K - 1, axis=1)[:, K - 1]
    return np.asarray(np.sqrt(np.maximum(0, distance)))


def find_outliers(X: Float32) -> dict[int, float]:
    """Return the rows of X (n, D) whose k-th neighbour is beyond a limit, with the ratio of its distance to the limit.

    Source: Iglewicz, Hoaglin, How to Detect and Handle Outliers (1993).
    """
    logs = np.log(np.maximum(kth_distance(X), np.finfo(np.float64).tiny))
    middle = np.median(logs)
    limit = middle + OUTLIER_SCORE * STD_PER_MAD * np.median(np.abs(logs - middle))
    return {int(row): float(np.exp(logs[row] - limit)) for row in np.flatnonzero(logs > limit)}


def copy_ratio(typical: Neighbours, n_queries: int) -> float:
    """Return the threshold of first / kth below which a row is a copy, in [0, MAX_RATIO].

    Parameters
    ----------
    typical : Neighbours    of base rows within the base, each without itself
    n_queries : int          number of queries
    """
    known = typical.first > ROUNDING  # identical rows say nothing about different images
    middle = float(np.median(typical.first[known] / typical.kth[known])) if known.any() else 0.0
    if not 0 < middle < 1:
        return 0.0
    dimension = np.log(_volume(0.5)) / np.log(middle)
    return float(min(MAX_RATIO, _volume(FALSE_ALARMS / max(1, n_queries)) ** (1 / dimension)))


def _volume(probability: float) -> float:
    """Return r^m with P(first < r * kth) = probability."""
    return float(-np.expm1(np.log1p(-min(probability, 0.5)) / (K - 1)))


def unit_rows(X: NDArray[np.floating]) -> Float32:
    """Scale rows to unit length, float32; a zero row stays zero."""
    norm = np.linalg.norm(X, axis=1, keepdims=True)
    return np.asarray(X / np.where(norm > 0, norm, 1), dtype=np.float32)

"""Nearest rows by angle, in blocks of bounded memory; which of them are copies. Pure functions of arrays: any room may enter.

Whether two images are near copies cannot be read off a similarity: how alike the features of different images are depends
on the backbone and on the data. It is read off the neighbourhood: around a point of m-dimensional data, the distances to
the nearest and to the k-th nearest of n others relate as

    P(first < r * kth) = 1 - (1 - r^m)^(k - 1)

whatever the density there (r^m are volumes, and k - 1 points lie evenly in the ball of the k-th). m is measured on the data
themselves, from the median of first / kth, which near copies hardly move as long as few rows have one. A row is a copy where
its ratio is so small that chance would give `FALSE_ALARMS` such rows in the whole search.

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

K = 10  # the neighbour that gives the scale: up to K - 1 copies of one image do not hide each other
LEAST_ROWS = 2 * K  # below which there is no scale
FALSE_ALARMS = 0.05  # expected in one search
MOST_RATIO = 0.5  # however many dimensions: a copy is at least twice as near as the k-th
SAME = 2e-3  # chord between rows that differ by rounding
FAR = 3.5  # robust standard deviations from the median
PER_MAD = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
BLOCK_BYTES = 64 << 20  # of similarities held at a time


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of each query the nearest row, and how far that and the k-th nearest are.

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
        """Return which queries are copies of their nearest row, bool (n,)."""
        return np.asarray((self.first <= SAME) | (self.first < ratio * self.kth))

    def pairs(self, ratio: float) -> Iterator[tuple[int, int, float]]:
        """Yield, where the queries are the base itself, each copy and the row that it is nearest to, once, with the cosine."""
        is_copy, similarity = self.copies(ratio), self.similarity
        for row in np.flatnonzero(is_copy).tolist():
            twin = int(self.nearest[row])
            if twin < row or not is_copy[twin]:
                yield row, twin, float(similarity[row])


def find_neighbours(queries: Float32, base: Float32, *, own: Int64 | None = None) -> Neighbours:
    """Find the nearest rows of a base, all of unit length.

    Parameters
    ----------
    queries : float32 (n, D)
    base : float32 (N, D)          N > K
    own : int64 (n,), optional     the row of the base that each query itself is, which does not count
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
    far = np.empty(len(X))
    step = max(1, BLOCK_BYTES // (X.itemsize * max(1, len(X))))
    for start in range(0, len(X), step):
        rows = slice(start, start + step)
        square = squares[rows, None] + squares - 2 * (X[rows] @ X.T)
        square[np.arange(len(square)), np.arange(start, start + len(square))] = np.inf
        far[rows] = np.partition(square, K - 1, axis=1)[:, K - 1]
    return np.asarray(np.sqrt(np.maximum(0, far)))


def outlying(distances: Float64) -> dict[int, float]:
    """Return the rows whose k-th neighbour is farther than is usual, with how many times the usual limit.

    Source: Iglewicz, Hoaglin, How to Detect and Handle Outliers (1993).
    """
    logs = np.log(np.maximum(distances, np.finfo(np.float64).tiny))
    middle = np.median(logs)
    limit = middle + FAR * PER_MAD * np.median(np.abs(logs - middle))
    return {int(row): float(np.exp(logs[row] - limit)) for row in np.flatnonzero(logs > limit)}


def copy_ratio(typical: Neighbours, searches: int) -> float:
    """Return the ratio first / kth below which a row is a copy, in [0, MOST_RATIO].

    Parameters
    ----------
    typical : Neighbours    of rows of the base within the base, themselves left out
    searches : int          how many queries will be asked
    """
    known = typical.first > SAME  # rows with a twin say nothing of the distance between different images
    middle = float(np.median(typical.first[known] / typical.kth[known])) if known.any() else 0.0
    if not 0 < middle < 1:
        return 0.0
    dimension = np.log(_volume(0.5)) / np.log(middle)
    return float(min(MOST_RATIO, _volume(FALSE_ALARMS / max(1, searches)) ** (1 / dimension)))


def _volume(probability: float) -> float:
    """Return r^m with P(first < r * kth) = probability."""
    return float(-np.expm1(np.log1p(-min(probability, 0.5)) / (K - 1)))


def unit_rows(X: Float32) -> Float32:
    """Scale rows to unit length, float32; a zero row stays zero."""
    norm = np.linalg.norm(X, axis=1, keepdims=True)
    return np.asarray(X / np.where(norm > 0, norm, 1), dtype=np.float32)

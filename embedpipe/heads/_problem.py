"""What a solver is given and what it returns: the one objective of all linear heads.

    mean over samples of cross-entropy(W x + b, y) + l2 / 2 * ||W||^2

on standardised features x, bias free, sample weights divided by their sum. Two classes are one
logit: W has one row, and the stored head has the rows -w/2 and +w/2.

A solver is a function ``solve_path(problem, l2s, start) -> list of Solution``, l2s falling; one
file each, and no other file knows how it works.

>>> [solution] = solve_path(Problem(X, y, sample_weight, n_classes=10), [1e-3])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
BLOCK_ROWS = 4096  # rows taken to float64 at a time


@dataclass(frozen=True, eq=False)
class Solution:
    """Float64 weights (K, D) on standardised features and bias (K,); K = 1 for two classes."""

    weight: Float64
    bias: Float64


@dataclass(frozen=True, eq=False)
class Problem:
    """A head to be fitted.

    Parameters
    ----------
    X : float32 (N, D)              standardised features
    y : int64 (N,)                  class in [0, n_classes), every class present
    sample_weight : float64 (N,)    positive, sums to 1
    """

    X: Float32
    y: Int64
    sample_weight: Float64
    n_classes: int

    @property
    def blind(self) -> Solution:
        """The optimum as l2 grows without bound: no weights, the class frequencies in the bias."""
        bias = np.log(np.bincount(self.y, self.sample_weight, self.n_classes))
        bias = bias[1:] - bias[:1] if self.n_classes == 2 else bias - bias.mean()
        return Solution(np.zeros((len(bias), self.X.shape[1])), bias)

    def objective(self, solution: Solution, l2: float) -> float:
        weights = self.sample_weight
        return objective(solution.weight, solution.bias, self.X, self.y, l2=l2, sample_weight=weights)


def objective(
    weight: ArrayLike, bias: ArrayLike, X: ArrayLike, y: ArrayLike, *, l2: float, sample_weight: ArrayLike | None = None
) -> float:
    """Return weighted mean cross-entropy + l2/2 * ||W||^2, in float64.

    Parameters
    ----------
    weight : float (K, D)    on standardised features; K = 1: the logit of class 1 of two
    bias : float (K,)
    X : float (N, D)         standardised features
    y : int (N,)             class index
    sample_weight : float (N,), optional    divided by its sum here
    """
    W, b = np.asarray(weight, dtype=np.float64), np.asarray(bias, dtype=np.float64)
    truth = np.asarray(y, dtype=np.int64)
    logits = affine(np.asarray(X), W, b)
    if len(W) == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    each = log_normaliser(logits) - logits[np.arange(len(truth)), truth]
    weights = None if sample_weight is None else np.asarray(sample_weight)
    return float(np.average(each, weights=weights) + l2 / 2 * np.sum(W * W))


def log_normaliser(logits: Float64) -> Float64:
    """Return log sum exp over classes, float64 (N,)."""
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))


def affine(X: NDArray[np.floating], weight: NDArray[np.floating], bias: NDArray[np.floating]) -> Float64:
    """Return X W' + b in float64 (N, K), block by block, so that X may be a memory map."""
    out = np.empty((len(X), len(weight)))
    W = weight.astype(np.float64).T
    for rows in blocks(len(X)):
        out[rows] = X[rows].astype(np.float64) @ W + bias
    return out


def blocks(n: int) -> Iterator[slice]:
    """Cut n rows into slices of at most BLOCK_ROWS."""
    return (slice(start, start + BLOCK_ROWS) for start in range(0, n, BLOCK_ROWS))

"""What a solver is given and what it returns: the one objective of all linear heads.

    mean over samples of cross-entropy(W x + b, y) + l2 / 2 * ||W||^2

on standardised features x, bias free, sample weights divided by their sum. Two classes are one
logit: W has one row, and the stored head has the rows -w/2 and +w/2.

A solver is a function ``solve_path(problem, l2s, start) -> list of Solution``, l2s falling; one
file each, and no other file knows how it works.

>>> [solution] = solve_path(Problem(X, y, sample_weight, n_classes=10), [1e-3])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
MEMORY_BYTES = 2**30  # that a solver may take beside the features
MADE_NUMBERS = 2**23  # that may be made of a block of rows
BLOCK_ROWS, BLOCK_NUMBERS = 4096, 2**20  # taken to float64 at a time: fresh memory costs more than they do
MIDDLE_ROWS = 1024  # that tell where the middle of all is
OFF = 0.1  # of the squared spread of rows: a squared middle that is taken off


@dataclass(frozen=True, eq=False)
class Solution:
    """Float64 weights (K, D) on standardised features and bias (K,); K = 1 for two classes.

    objective : float        of a solver that minimises another one than that of the problem
    loo_accuracy : float     of the training samples, each left out in turn, where that comes for free
    loo_rmse : float         the same of numbers
    """

    weight: Float64
    bias: Float64
    objective: float | None = None
    loo_accuracy: float | None = None
    loo_rmse: float | None = None


@dataclass(frozen=True, eq=False)
class Chunked:
    """Features that are read when they are asked for, for a set that memory does not hold.

    Parameters
    ----------
    shape : (N, D)
    read : rows -> float32 (n, D)    rows are a slice or rising numbers int64 (n,)
    """

    shape: tuple[int, int]
    read: Callable[[Any], Float32]

    ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Float32:
        return self.read(rows)

    def changed(self, change: Callable[[Float32], Float32], kept: Int64 | None = None) -> Chunked:
        """Return these features as `change` makes them; of some rows alone, where numbers are given."""
        n = len(self) if kept is None else len(kept)
        return Chunked((n, self.shape[1]), lambda rows: change(self.read(rows if kept is None else kept[rows])))


@dataclass(frozen=True, eq=False)
class Moments:
    """Of weighted rows, float64: mean (D,), covariance (D, D), and covariance with the targets of least squares (D, K)."""

    mean: Float64
    covariance: Float64
    across: Float64


@dataclass(frozen=True, eq=False)
class Problem:
    """A head to be fitted.

    Parameters
    ----------
    X : float32 (N, D)              standardised features
    y : int64 (N,)                  class in [0, n_classes), every class present; or (N, K) of 0 and 1: labels, any number of
                                    which an image may have; or float64 (N,): numbers of mean 0 and std 1, n_classes is 1
    sample_weight : float64 (N,)    positive, sums to 1
    memory_bytes : int              that a solver may take beside X
    moments : Moments, optional     of X and y, where they are known
    """

    X: Float32 | Chunked
    y: Int64 | Float64
    sample_weight: Float64
    n_classes: int
    memory_bytes: int = MEMORY_BYTES
    moments: Moments | None = None

    @property
    def numeric(self) -> bool:
        """Whether numbers are asked for."""
        return self.y.dtype.kind == "f"

    @property
    def apart(self) -> bool:
        """Whether every logit is a question of its own: several labels, or two classes, which are one question."""
        return self.y.ndim == 2 or self.n_classes == 2

    @property
    def rows(self) -> int:
        """K, the number of logits."""
        return 1 if self.y.ndim == 1 and self.n_classes == 2 else self.n_classes

    @property
    def blind(self) -> Solution:
        """The optimum as l2 grows without bound: no weights, the class frequencies in the bias."""
        if self.apart:
            labels = self.y.reshape(len(self.y), -1)
            bias = np.log(self.sample_weight @ labels) - np.log(self.sample_weight @ (1 - labels))
        else:
            bias = np.log(np.bincount(self.y, self.sample_weight, self.n_classes))
            bias -= bias.mean()
        return Solution(np.zeros((len(bias), self.X.shape[1])), bias)

    @property
    def array(self) -> Float32:
        """All features, in memory."""
        return self.X[:] if isinstance(self.X, Chunked) else self.X

    def objective(self, solution: Solution, l2: float) -> float:
        weights = self.sample_weight
        return objective(solution.weight, solution.bias, self.X, self.y, l2=l2, sample_weight=weights)


def centred(problem: Problem) -> tuple[Problem, Float64]:
    """Return a problem whose rows lie around 0, and the middle (D,) that was taken off; 0 where that would change little.

    Some rows tell where the middle is, about. Far from 0 every weight would move all logits, and be tied to the bias.
    """
    some = np.arange(0, len(problem.X), -(-len(problem.X) // MIDDLE_ROWS))
    x, weights = problem.X[some].astype(np.float64), problem.sample_weight[some]
    middle = weights @ x / weights.sum()
    spread = weights @ np.square(x - middle) / weights.sum()
    if not middle @ middle > OFF * spread.sum():
        return problem, np.zeros_like(middle)

    def around(rows: Float32) -> Float32:
        return np.asarray(rows - middle, dtype=np.float32)

    if isinstance(problem.X, Chunked):
        return replace(problem, X=problem.X.changed(around), moments=None), middle
    if problem.X.nbytes > problem.memory_bytes / 2:
        whole = problem.X
        return replace(problem, X=Chunked(whole.shape, lambda rows: around(whole[rows])), moments=None), middle
    X = np.empty_like(problem.X)
    for rows in blocks(X):
        X[rows] = around(problem.X[rows])
    return replace(problem, X=X, moments=None), middle


def narrow(problem: Problem) -> tuple[Problem, Float64 | None]:
    """Return a problem with fewer features than rows, and the orthonormal basis (D, r) of the features kept.

    The optimum lies in the span of the rows. A problem that is narrow already comes back as it is, without a basis.
    """
    if len(problem.X) >= problem.X.shape[1]:
        return problem, None
    basis, triangle = np.linalg.qr(problem.array.T.astype(np.float64))
    return replace(problem, X=np.ascontiguousarray(triangle.T), moments=None), basis


def objective(
    weight: ArrayLike,
    bias: ArrayLike,
    X: ArrayLike | Chunked,
    y: ArrayLike,
    *,
    l2: float,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Return weighted mean cross-entropy + l2/2 * ||W||^2, in float64; of several labels the sum of their cross-entropies.

    Parameters
    ----------
    weight : float (K, D)    on standardised features; K = 1: the logit of class 1 of two
    bias : float (K,)
    X : float (N, D)         standardised features
    y : int (N,) or (N, K)   class index, or 0 and 1 for each of K labels
    sample_weight : float (N,), optional    divided by its sum here
    """
    W, b = np.asarray(weight, dtype=np.float64), np.asarray(bias, dtype=np.float64)
    truth = np.asarray(y, dtype=np.int64)
    logits = affine(X if isinstance(X, Chunked) else np.asarray(X), W, b)
    if truth.ndim == 2 or len(W) == 1:
        each = np.logaddexp(0, logits * (1 - 2 * truth.reshape(logits.shape))).sum(axis=1)
    else:
        each = log_normaliser(logits) - logits[np.arange(len(truth)), truth]
    weights = None if sample_weight is None else np.asarray(sample_weight)
    return float(np.average(each, weights=weights) + l2 / 2 * np.sum(W * W))


def log_normaliser(logits: Float64) -> Float64:
    """Return log sum exp over classes, float64 (N,)."""
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))


def affine(X: NDArray[np.floating] | Chunked, weight: NDArray[np.floating], bias: NDArray[np.floating]) -> Float64:
    """Return X W' + b in float64 (N, K), block by block, so that X may be a memory map."""
    out = np.empty((len(X), len(weight)))
    W = weight.astype(np.float64).T
    for rows in blocks(X):
        out[rows] = X[rows].astype(np.float64) @ W + bias
    return out


def blocks(X: Any, more: int = 0) -> Iterator[slice]:
    """Cut rows (N, D) into slices of at most BLOCK_ROWS and about BLOCK_NUMBERS; `more` numbers are made of each row."""
    size = min(BLOCK_ROWS, max(256, BLOCK_NUMBERS // X.shape[1]), max(1, MADE_NUMBERS // max(1, more)))
    return (slice(start, start + size) for start in range(0, len(X), size))


def some_of(X: NDArray[Any] | Chunked, rows: Int64) -> Any:
    """Return some rows of features, which stay unread where they are `Chunked`."""
    return X.changed(lambda x: x, rows) if isinstance(X, Chunked) else X[rows]

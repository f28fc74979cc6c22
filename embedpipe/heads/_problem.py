"""The training problem that a solver receives, and the objective of all linear heads.

    sum_i s_i * cross-entropy(W x_i + b, y_i) + l2 / 2 * ||W||^2

on standardised features x_i (D,), with sample weights s_i that sum to 1 and a free bias b (K,). W (K, D) has one row for each
logit: K = C classes, or K = 1 for two classes, whose head has the rows -w/2 and +w/2, or K = C independent labels, whose
cross-entropies are summed.

A solver is a function ``solve(l2s, weight, bias, tolerance)``. From weights (L, K, D) and biases (L, K) it minimises the
objective for L values of l2, until it is at most `tolerance` above its minimum, relative to it. It returns weights, biases and
objectives (L,), float64.

>>> weight, bias = problem.start
>>> weights, biases, objectives = make_solver(problem)([1e-3], weight[None], bias[None], TOLERANCE)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Optimum = tuple[Float64, Float64, Float64]  # weights (L, K, D), biases (L, K), objectives (L,)
Solve = Callable[[Sequence[float], Float64, Float64, float], Optimum]

TOLERANCE = 4e-7  # of a solution: (f - min f) / f

MEMORY_BYTES = 2**30  # that a solver may use besides the features
MAX_BLOCK_NUMBERS = 2**23  # computed from a block of rows
BLOCK_ROWS, BLOCK_NUMBERS = 4096, 2**20  # of a block of rows
MEAN_ROWS = 1024  # sampled rows that estimate the mean
OFF_CENTRE = 0.1  # squared norm of the mean, relative to the total variance, above which features are centred


@dataclass(frozen=True, eq=False)
class ChunkedFeatures:
    """Features that are read when they are indexed, for a data set that does not fit in memory.

    Parameters
    ----------
    shape : (N, D)
    read : rows -> float32 (n, D)    rows are a slice or rising indices, int64 (n,)
    """

    shape: tuple[int, int]
    read: Callable[[Any], Float32]

    ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Float32:
        return self.read(rows)

    def map(self, transform: Callable[[Float32], Float32]) -> ChunkedFeatures:
        """Return the transformed features."""
        return ChunkedFeatures(self.shape, lambda rows: transform(self.read(rows)))


Features = NDArray[Any] | ChunkedFeatures  # float32 (N, D)


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows to fit a head on, and other rows that score it.

    X, y, sample_weight : as in `fit_linear`
    X_held_out, y_held_out : features (n, D) and targets
    """

    X: Features
    y: NDArray[Any]
    X_held_out: Features
    y_held_out: NDArray[Any]
    sample_weight: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """Standardised training data, and what is needed to express a solution for raw features and all classes.

    Parameters
    ----------
    X : float32 (N, D)                   standardised features
    y : int64 (N,)                       class in [0, n_classes), every class present; or int64 (N, K), 0 and 1 for K labels; or
                                         float64 (N,), standardised numbers, with n_classes = 1
    sample_weight : float64 (N,)         positive, sums to 1
    n_classes : int
    memory_bytes : int                   that a solver may use besides X
    mean, std : float64 (D,), optional   of the raw features
    classes : tuple of str               all C of them
    present : int64 (P,)                 classes that the rows of a solution belong to
    absent_bias : float64 (C,) or 0      bias of labels that all or no training samples have
    y_mean, y_std : float                of numbers
    task : str                           as in `LinearHead`
    provenance : dict                    how the features were standardised
    """

    X: Features
    y: Int64 | Float64
    sample_weight: Float64
    n_classes: int
    memory_bytes: int = MEMORY_BYTES
    mean: Float64 = field(default_factory=lambda: np.zeros(0))
    std: Float64 = field(default_factory=lambda: np.ones(0))
    classes: tuple[str, ...] = ()
    present: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    absent_bias: Float64 | float = 0.0
    y_mean: float = 0.0
    y_std: float = 1.0
    task: str = "single"
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def numeric(self) -> bool:
        """Whether the targets are numbers."""
        return self.y.dtype.kind == "f"

    @property
    def independent(self) -> bool:
        """Whether each logit has a sigmoid of its own: several labels, or two classes, which share one logit."""
        return self.y.ndim == 2 or self.n_classes == 2

    @property
    def n_logits(self) -> int:
        """K, the number of rows of W."""
        return 1 if self.y.ndim == 1 and self.n_classes == 2 else self.n_classes

    @cached_property
    def start(self) -> tuple[Float64, Float64]:
        """Zero weights (K, D) and the logits of the class frequencies (K,): the optimum as l2 grows without bound."""
        if self.independent:
            labels = self.y.reshape(len(self.y), -1)
            bias = np.log(self.sample_weight @ labels) - np.log(self.sample_weight @ (1 - labels))
        else:
            bias = np.log(np.bincount(self.y, self.sample_weight, self.n_classes))
            bias -= bias.mean()
        return np.zeros((len(bias), self.X.shape[1])), bias

    def objective(self, weight: Float64, bias: Float64, l2: float) -> float:
        """Return the objective of weights (K, D) and bias (K,), in float64."""
        losses = cross_entropy(affine(self.X, weight, bias), self.y.astype(np.int64, copy=False))
        return float(np.average(losses, weights=self.sample_weight) + l2 / 2 * np.sum(weight * weight))


def centre_features(problem: Problem) -> tuple[Problem, Float64]:
    """Return a problem with centred features, and the centre (D,) that was subtracted; 0 if the features lie around 0 already.

    The mean is estimated on some rows. Far from 0, the logits of all weights would be strongly correlated with the bias.
    """
    rows = np.arange(0, len(problem.X), -(-len(problem.X) // MEAN_ROWS))
    x, weights = problem.X[rows].astype(np.float64), problem.sample_weight[rows]
    mean = weights @ x / weights.sum()
    variance = weights @ np.square(x - mean) / weights.sum()
    if not mean @ mean > OFF_CENTRE * variance.sum():
        return problem, np.zeros_like(mean)
    X = map_features(problem.X, lambda x: (x - mean).astype(np.float32), problem.memory_bytes // 2)
    return replace(problem, X=X), mean


def feature_means(X: Features) -> Float64:
    """Return the mean of every feature, float64 (D,); 0 if there are no rows."""
    total = sum((X[rows].sum(axis=0, dtype=np.float64) for rows in blocks(X)), np.zeros(X.shape[1]))
    return np.asarray(total / max(1, len(X)))


def map_features(X: Features, transform: Callable[[Float32], Float32], max_bytes: float) -> Features:
    """Return transformed features (N, D): a copy up to `max_bytes`, otherwise transformed again whenever they are read."""
    if isinstance(X, ChunkedFeatures):
        return X.map(transform)
    if X.nbytes > max_bytes:
        return ChunkedFeatures(X.shape, X.__getitem__).map(transform)
    transformed = np.empty_like(X)
    for rows in blocks(X):
        transformed[rows] = transform(X[rows])
    return transformed


def project_rows(problem: Problem) -> tuple[Problem, Float64 | None]:
    """Return a problem with at most N features, and the orthonormal basis (D, N) they refer to; None if N >= D already.

    The optimal weights lie in the span of the rows.
    """
    if len(problem.X) >= problem.X.shape[1]:
        return problem, None
    basis, triangle = np.linalg.qr(problem.X[:].T.astype(np.float64))
    return replace(problem, X=np.ascontiguousarray(triangle.T)), basis


def stack_rows(X: Features, below: Features) -> Features:
    """Return the rows of two sets of features, one below the other."""
    if not isinstance(X, ChunkedFeatures) and not isinstance(below, ChunkedFeatures):
        return np.concatenate([X, below])

    def read(rows: Any) -> Float32:
        index = np.arange(len(X) + len(below))[rows]
        cut = np.searchsorted(index, len(X))
        return np.concatenate([X[index[:cut]], below[index[cut:] - len(X)]])

    return ChunkedFeatures((len(X) + len(below), X.shape[1]), read)


def cross_entropy(logits: Float64, y: Int64) -> Float64:
    """Return the cross-entropy of each row, float64 (N,), of logits (N, K): independent ones if y is (N, K) or K = 1."""
    if y.ndim == 2 or logits.shape[1] == 1:
        return np.asarray(np.logaddexp(0, logits * (1 - 2 * y.reshape(logits.shape))).sum(axis=1))
    return np.asarray(log_normaliser(logits) - logits[np.arange(len(y)), y])


def log_normaliser(logits: Float64) -> Float64:
    """Return log sum exp over classes, float64 (N,)."""
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))


def affine(X: Features, weight: NDArray[np.floating], bias: NDArray[np.floating]) -> Float64:
    """Return X W' + b in float64 (N, K), block by block, so that X may be a memory map."""
    out = np.empty((len(X), len(weight)))
    W = weight.astype(np.float64).T
    for rows in blocks(X):
        out[rows] = X[rows].astype(np.float64) @ W + bias
    return out


def blocks(X: Any, *, rows: int | None = None, row_numbers: int = 0) -> Iterator[slice]:
    """Cut the rows of X (N, D) into slices of about BLOCK_NUMBERS features.

    Parameters
    ----------
    rows : int, optional    number of rows, if not all N
    row_numbers : int       numbers that are computed from each row, of which a block has at most MAX_BLOCK_NUMBERS
    """
    n = len(X) if rows is None else rows
    size = min(BLOCK_ROWS, max(256, BLOCK_NUMBERS // X.shape[1]), max(1, MAX_BLOCK_NUMBERS // max(1, row_numbers)))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def select_rows(X: Features, rows: Int64) -> Any:
    """Return the rows of features with the indices (n,); `ChunkedFeatures` features stay unread."""
    if isinstance(X, ChunkedFeatures):
        return ChunkedFeatures((len(rows), X.shape[1]), lambda part: X.read(rows[part]))
    return X[rows]

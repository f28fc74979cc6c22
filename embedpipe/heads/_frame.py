"""The frame around a solver: raw features to a Problem, its Solution to a LinearHead.

>>> frame = make_frame(X, y, classes=("cat", "dog"), standardize=True, sample_weight=None)
>>> head = frame.head_of(solution, provenance={})
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import NonFiniteFeatures, UsageError
from embedpipe.heads._problem import MEMORY_BYTES, Chunked, Float32, Float64, Int64, Problem, Solution, affine, blocks
from embedpipe.heads.linear import LinearHead

STD_FLOOR = 0.01  # of the median std, so that dead features are not blown up
NO_WEIGHT = 1e-12  # of the largest sample weight: less moves no digit of the loss
ABSENT_MARGIN = 20.0  # logits below the winner; e^-20 = 2e-9


@dataclass(frozen=True, eq=False)
class Frame:
    """A problem, and the way back to raw features and to all classes.

    Parameters
    ----------
    mean, std : float64 (D,)     of the standardiser
    classes : tuple of str       all of them, C
    present : int64 (P,)         those with training samples, P >= 2; what `problem` knows
    """

    problem: Problem
    mean: Float64
    std: Float64
    classes: tuple[str, ...]
    present: Int64

    def head_of(self, solution: Solution, provenance: dict[str, Any]) -> LinearHead:
        """Fold the standardiser in.

        A class without training samples gets zero weights and a bias 20 below the least winning
        training logit.
        """
        rows = solution
        if len(self.present) == 2:
            half = np.array([[-0.5], [0.5]])
            rows = Solution(half * solution.weight, half[:, 0] * solution.bias)
        weight = np.zeros((len(self.classes), len(self.mean)), dtype=np.float32)
        weight[self.present] = rows.weight / self.std
        bias = np.zeros(len(self.classes))
        # with the rounded weights, so that rounding acts on x - mean and not on x
        bias[self.present] = rows.bias - weight[self.present].astype(np.float64) @ self.mean
        absent = np.setdiff1d(np.arange(len(self.classes)), self.present)
        if len(absent):
            winning = affine(self.problem.X, rows.weight, rows.bias).max(axis=1)
            bias[absent] = winning.min() - ABSENT_MARGIN
        return LinearHead(weight, bias.astype(np.float32), self.classes, provenance)

    def solution_of(self, head: LinearHead) -> Solution:
        """Return a head as a start for a solver, the inverse of `head_of`.

        Raises
        ------
        UsageError    a head of other classes or another width
        """
        if head.classes != self.classes or head.feature_dim != len(self.mean):
            raise UsageError(
                f"a start with {len(head.classes)} classes and {head.feature_dim} features, "
                f"expected the same {len(self.classes)} classes and {len(self.mean)} features"
            )
        raw = head.weight[self.present].astype(np.float64)
        weight, bias = raw * self.std, head.bias[self.present] + raw @ self.mean
        if len(self.present) == 2:
            return Solution(weight[1:] - weight[:1], bias[1:] - bias[:1])
        return Solution(weight, bias)


def make_frame(
    X: ArrayLike | Chunked,
    y: ArrayLike,
    *,
    classes: Sequence[str],
    standardize: bool,
    sample_weight: ArrayLike | None,
    memory_bytes: int = MEMORY_BYTES,
) -> Frame:
    """Check and standardise training data; samples without weight only count for the standardiser.

    What is `Chunked` stays so: it is standardised as it is read.

    Raises
    ------
    UsageError           fewer than two classes have samples; labels or weights that do not fit
    NonFiniteFeatures    X has NaN or inf; the first bad row is named
    """
    features, labels = check_labelled(X, y, len(classes))
    weights = _check_weights(sample_weight, len(labels))
    kept = weights > NO_WEIGHT * weights.max(initial=0)
    present, place = np.unique(labels[kept], return_inverse=True)
    if len(present) < 2:
        raise UsageError(
            f"classes with training samples: {len(present)}, expected at least 2", hint="add images of another class"
        )
    mean, std = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if standardize:
        mean, std = measure(features)
    scaled: Float32 | Chunked
    if isinstance(features, Chunked):
        scaled = features.scaled(mean, std, None if kept.all() else np.flatnonzero(kept))
    else:
        whole = np.empty_like(features)
        for rows in blocks(len(features)):
            whole[rows] = (features[rows] - mean) / std
        scaled = whole if kept.all() else whole[kept]
    weights = weights[kept] / weights[kept].sum()
    problem = Problem(scaled, place, weights, len(present), memory_bytes)
    return Frame(problem, mean, std, tuple(classes), present)


def measure(X: Float32 | Chunked) -> tuple[Float64, Float64]:
    """Return mean and std of every feature, float64 (D,), the std floored at 0.01 x the median std.

    Where the median is zero, the median of the features that vary takes its place.
    """
    mean = sum((X[rows].sum(axis=0, dtype=np.float64) for rows in blocks(len(X))), np.zeros(X.shape[1])) / len(X)
    squares = sum(np.square(X[rows] - mean).sum(axis=0) for rows in blocks(len(X)))
    std = np.sqrt(squares / len(X))
    alive = std[std > 0] if std.any() else np.ones(1)
    return mean, np.maximum(std, STD_FLOOR * (np.median(std) or np.median(alive)))


def class_weights(y: ArrayLike, n_classes: int) -> Float64:
    """Return a weight a class, float64 (C,), inverse to its count; 0 for a class without samples.

    As sample weights they are class_weights(y, C)[y], of mean 1.
    """
    counts = np.bincount(np.asarray(y, dtype=np.int64), minlength=n_classes)
    total = counts.sum() / max(1, np.count_nonzero(counts))
    return np.asarray(np.divide(total, counts, out=np.zeros(n_classes), where=counts > 0))


def check_labelled(X: ArrayLike | Chunked, y: ArrayLike, n_classes: int) -> tuple[Any, Int64]:
    """Return features float32 (N, D), `Chunked` as they came, and labels int64 (N,).

    Raises
    ------
    UsageError           shapes that do not belong together, a label outside [0, n_classes)
    NonFiniteFeatures    NaN or inf; the first bad row is named
    """
    with np.errstate(over="ignore"):
        features = X if isinstance(X, Chunked) else np.asarray(X, dtype=np.float32)
    labels = np.asarray(y, dtype=np.int64)
    if features.ndim != 2 or features.shape[1] == 0 or labels.shape != features.shape[:1]:
        raise UsageError(f"X {features.shape} and y {labels.shape}, expected (N, D) and (N,)")
    bad = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(bad):
        raise UsageError(f"label {labels[bad[0]]} in row {bad[0]}, expected 0 to {n_classes - 1}", row=int(bad[0]))
    for rows in blocks(len(features)):
        bad = np.flatnonzero(~np.isfinite(features[rows]).all(axis=1))
        if len(bad):
            row = rows.start + int(bad[0])
            raise NonFiniteFeatures(f"NaN or infinity in row {row} of the features", hint="extract it again", row=row)
    return features, labels


def _check_weights(sample_weight: ArrayLike | None, n: int) -> Float64:
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise UsageError(f"sample_weight of shape {weights.shape}, expected ({n},) finite and not negative")
    return weights

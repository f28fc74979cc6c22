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
from embedpipe.heads._gram import Gram
from embedpipe.heads._problem import MEMORY_BYTES, Chunked, Float32, Float64, Int64, Problem, Solution, affine, blocks
from embedpipe.heads.linear import LinearHead

STD_FLOOR = 0.01  # of the median std, so that dead features are not blown up
FAR = 1e30  # float32 ends at 3.4e38
NO_WEIGHT = 1e-12  # of the largest sample weight: less moves no digit of the loss
SMALLEST = 1e-100  # std of targets, whose square is a number yet
ABSENT_MARGIN = 20.0  # logits below the winner; e^-20 = 2e-9


@dataclass(frozen=True, eq=False)
class Asked:
    """What a solver is asked for, and how its answer is put back.

    Parameters
    ----------
    y : as in `Problem`
    present : int64 (P,)       classes with training samples, at least 2; labels that some of these have and others lack
    certain : float64 (C,)     bias of the labels that all or none of these have
    offset, scale : float      mean and std of numbers
    """

    y: Int64 | Float64
    present: Int64
    certain: Float64
    offset: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Frame:
    """A problem, and the way back to raw features and to all classes.

    Parameters
    ----------
    mean, std : float64 (D,)     of the standardiser
    classes : tuple of str       all of them, C
    asked : Asked                what `problem` knows of them
    task : str                   as in `LinearHead`
    """

    problem: Problem
    mean: Float64
    std: Float64
    classes: tuple[str, ...]
    asked: Asked
    task: str = "single"

    @property
    def present(self) -> Int64:
        return self.asked.present

    def head_of(self, solution: Solution, provenance: dict[str, Any]) -> LinearHead:
        """Fold the standardiser in.

        A class without training samples gets zero weights and a bias 20 below the least winning
        training logit; a label that no training sample has, or that all have, a bias of -20 or 20.
        """
        scale = self.asked.scale
        rows = Solution(scale * solution.weight, scale * solution.bias + self.asked.offset)
        if self.is_one_logit:
            half = np.array([[-0.5], [0.5]])
            rows = Solution(half * solution.weight, half[:, 0] * solution.bias)
        dtype = np.float64 if self.task == "regression" else np.float32
        weight = np.zeros((len(self.classes), len(self.mean)), dtype=dtype)
        weight[self.present] = rows.weight / self.std
        bias = self.asked.certain.copy()
        # with the rounded weights, so that rounding acts on x - mean and not on x
        bias[self.present] = rows.bias - weight[self.present].astype(np.float64) @ self.mean
        absent = np.setdiff1d(np.arange(len(self.classes)), self.present)
        if len(absent) and self.task == "single":
            winning = affine(self.problem.X, rows.weight, rows.bias).max(axis=1)
            bias[absent] = winning.min() - ABSENT_MARGIN
        return LinearHead(weight, bias.astype(dtype), self.classes, provenance, self.task)

    @property
    def is_one_logit(self) -> bool:
        return self.task == "single" and len(self.present) == 2

    def solution_of(self, head: LinearHead) -> Solution:
        """Return a head as a start for a solver, the inverse of `head_of`.

        Raises
        ------
        UsageError    a head of other classes or another width
        """
        if (head.task, head.classes) != (self.task, self.classes) or head.feature_dim != len(self.mean):
            raise UsageError(
                f"a start with {len(head.classes)} classes and {head.feature_dim} features, "
                f"expected the same {len(self.classes)} classes and {len(self.mean)} features"
            )
        raw = head.weight[self.present].astype(np.float64)
        weight, bias = raw * self.std, head.bias[self.present] + raw @ self.mean
        if self.is_one_logit:
            return Solution(weight[1:] - weight[:1], bias[1:] - bias[:1])
        return Solution(weight, bias)


def make_frame(
    X: ArrayLike | Chunked,
    y: ArrayLike,
    *,
    classes: Sequence[str],
    standardize: bool,
    sample_weight: ArrayLike | None,
    task: str = "single",
    memory_bytes: int = MEMORY_BYTES,
    gram: Gram | None = None,
) -> Frame:
    """Check and standardise training data; samples without weight only count for the standardiser.

    What is `Chunked` stays so: it is standardised as it is read.

    Raises
    ------
    UsageError           fewer than two classes have samples, no label or number varies; labels or weights that do not fit
    NonFiniteFeatures    X has NaN or inf; the first bad row is named
    """
    features, labels = check_labelled(X, y, len(classes), task)
    weights = _check_weights(sample_weight, len(labels))
    kept = weights > NO_WEIGHT * weights.max(initial=0)
    asked = _ask(labels[kept], weights[kept], len(classes), task)
    scaler = Scaler.of(features) if standardize else Scaler(np.zeros(features.shape[1]), np.ones(features.shape[1]))
    scaled: Float32 | Chunked
    if isinstance(features, Chunked):
        scaled = features.changed(scaler, None if kept.all() else np.flatnonzero(kept))
    elif not standardize:
        scaled = features if kept.all() else features[kept]
    else:
        whole = np.empty_like(features)
        for rows in blocks(features):
            whole[rows] = scaler(features[rows])
        scaled = whole if kept.all() else whole[kept]
    weights = weights[kept] / weights[kept].sum()
    moments = gram.moments(scaler.mean, scaler.inverse, asked.present) if gram and sample_weight is None else None
    problem = Problem(scaled, asked.y, weights, len(asked.present), memory_bytes, moments)
    return Frame(
        problem, scaler.mean.astype(np.float64), 1 / scaler.inverse.astype(np.float64), tuple(classes), asked, task
    )


@dataclass(frozen=True, eq=False)
class Scaler:
    """x (n, D) -> (x - mean) * inverse, float32.

    mean, inverse : (D,)    float32, so that a block of rows is done at the speed of memory; float64 where float32 would
                            overflow. What rounding moves in them, it moves in the head that is made with them, too
    """

    mean: Any
    inverse: Any

    @classmethod
    def of(cls, X: Float32 | Chunked) -> Scaler:
        mean, std = measure(X)
        inverse = 1 / std
        plain = np.abs([mean, inverse, mean * inverse]).max() < FAR and inverse.min() > 1 / FAR
        return cls(mean.astype(np.float32), inverse.astype(np.float32)) if plain else cls(mean, inverse)

    def __call__(self, x: Float32) -> Float32:
        out = x - self.mean
        out *= self.inverse
        return np.asarray(out, dtype=np.float32)


def _ask(y: Any, weights: Float64, n_classes: int, task: str) -> Asked:
    """Return what the targets of samples with a weight leave open."""
    certain = np.zeros(n_classes)
    if task == "regression":
        if not len(y) or np.ptp(y) == 0:
            raise UsageError("training targets: one value, expected several", hint="add images with another target")
        offset = np.average(y, weights=weights)
        scale = np.sqrt(np.average((y - offset) ** 2, weights=weights))
        if not SMALLEST <= scale <= 1 / SMALLEST:
            raise UsageError(
                f"training targets vary by {np.ptp(y):.1g}, expected from {SMALLEST:g} to {1 / SMALLEST:g}",
                hint="give them in another unit",
            )
        return Asked((y - offset) / scale, np.zeros(1, np.int64), certain, float(offset), float(scale))
    if task == "multilabel":
        counts = y.sum(axis=0)
        present = np.flatnonzero((counts > 0) & (counts < len(y)))
        if not len(present):
            raise UsageError(
                "labels that some training images have and others lack: 0, expected at least 1",
                hint="add images with and without each label",
            )
        certain[:] = np.where(counts > 0, ABSENT_MARGIN, -ABSENT_MARGIN)
        return Asked(np.ascontiguousarray(y[:, present]), present, certain)
    present, place = np.unique(y, return_inverse=True)
    if len(present) < 2:
        raise UsageError(
            f"classes with training samples: {len(present)}, expected at least 2", hint="add images of another class"
        )
    return Asked(place, present, certain)


def measure(X: Float32 | Chunked) -> tuple[Float64, Float64]:
    """Return mean and std of every feature, float64 (D,), the std floored at 0.01 x the median std.

    Where the median is zero, the median of the features that vary takes its place.
    """
    n = max(1, len(X))
    mean = sum((X[rows].sum(axis=0, dtype=np.float64) for rows in blocks(X)), np.zeros(X.shape[1])) / n
    squares = sum(np.square(X[rows] - mean).sum(axis=0) for rows in blocks(X))
    std = np.sqrt(squares / n)
    alive = std[std > 0] if std.any() else np.ones(1)
    return mean, np.maximum(std, STD_FLOOR * (np.median(std) or np.median(alive)))


def class_weights(y: ArrayLike, n_classes: int) -> Float64:
    """Return a weight a class, float64 (C,), inverse to its count; 0 for a class without samples.

    As sample weights they are class_weights(y, C)[y], of mean 1.
    """
    counts = np.bincount(np.asarray(y, dtype=np.int64), minlength=n_classes)
    total = counts.sum() / max(1, np.count_nonzero(counts))
    return np.asarray(np.divide(total, counts, out=np.zeros(n_classes), where=counts > 0))


def check_labelled(X: ArrayLike | Chunked, y: ArrayLike, n_classes: int, task: str = "single") -> tuple[Any, Any]:
    """Return features float32 (N, D), `Chunked` as they came, and targets as `LinearHead` is asked for them.

    Returns
    -------
    X, y    int64 (N,); of several labels int64 (N, C), 0 and 1; of numbers float64 (N,)

    Raises
    ------
    UsageError           shapes that do not belong together, a label outside [0, n_classes), a number that is not finite
    NonFiniteFeatures    NaN or inf; the first bad row is named
    """
    with np.errstate(over="ignore"):
        features = X if isinstance(X, Chunked) else np.asarray(X, dtype=np.float32)
    labels = _numbers(y, np.float64 if task == "regression" else np.int64)
    columns = (n_classes,) if task == "multilabel" else ()
    if features.ndim != 2 or features.shape[1] == 0 or labels.shape != (len(features), *columns):
        raise UsageError(f"X {features.shape} and y {labels.shape}, expected (N, D) and {('N', *columns)}")
    last = 1 if task == "multilabel" else n_classes - 1
    wrong = ~np.isfinite(labels) if task == "regression" else (labels < 0) | (labels > last)
    if wrong.any():
        row, expected = int(wrong.nonzero()[0][0]), "a finite number" if task == "regression" else f"0 to {last}"
        raise UsageError(f"label {labels[row]} in row {row}, expected {expected}", row=row)
    for rows in blocks(features):
        bad = np.flatnonzero(~np.isfinite(features[rows]).all(axis=1))
        if len(bad):
            row = rows.start + int(bad[0])
            raise NonFiniteFeatures(f"NaN or infinity in row {row} of the features", hint="extract it again", row=row)
    return features, labels


def _numbers(y: ArrayLike, dtype: type) -> Any:
    """Return targets as numbers, of classes whole ones.

    Raises
    ------
    UsageError    texts, or a part of a class
    """
    given = np.asarray(y)
    try:
        numbers: Any = given.astype(dtype)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"y of {given.dtype}, expected {dtype.__name__}", hint="give each class a number") from exc
    if dtype is np.int64 and given.dtype.kind == "f" and (given != numbers).any():
        row = int((given != numbers).nonzero()[0][0])
        raise UsageError(f"label {given[row]} in row {row}, expected a whole number", row=row)
    return numbers


def _check_weights(sample_weight: ArrayLike | None, n: int) -> Float64:
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise UsageError(f"sample_weight of shape {weights.shape}, expected ({n},) finite and not negative")
    return weights

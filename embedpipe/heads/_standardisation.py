"""Standardisation: raw features and targets to a `Problem`, and weights on standardised features to a `LinearHead`.

With the mean m and the standard deviation d of every feature, W x + b on x = (X - m) / d equals (W / d) X + b - (W / d) m.

>>> problem = make_problem(X, y, classes=("cat", "dog"), standardize=True, sample_weight=None)
>>> head = fold(problem, weight, bias, provenance={})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import NonFiniteFeatures, UsageError
from embedpipe.heads._problem import (
    MEMORY_BYTES,
    ChunkedFeatures,
    Features,
    Float32,
    Float64,
    Int64,
    Problem,
    affine,
    blocks,
    feature_means,
    map_features,
    select_rows,
)
from embedpipe.heads.linear import LinearHead

STD_FLOOR = 0.01  # of the median std, so that constant features are not amplified
FLOAT32_LIMIT = 1e30  # float32 overflows at 3.4e38
NEGLIGIBLE_WEIGHT = 1e-12  # of the largest sample weight; changes no digit of the loss
MIN_TARGET_STD = 1e-100  # the square of a smaller one underflows
ABSENT_MARGIN = 20.0  # of a logit below the winner; e^-20 = 2e-9


def make_problem(
    X: Features,
    y: ArrayLike,
    *,
    classes: Sequence[str],
    task: str = "single",
    standardize: bool = True,
    sample_weight: ArrayLike | None = None,
    widths: Sequence[int] = (),
    block_weights: Sequence[float] = (),
    memory_bytes: float = MEMORY_BYTES,
) -> Problem:
    """Check and standardise training data; `fit_linear` describes the parameters.

    Samples without weight only contribute to the mean and std of the features. `ChunkedFeatures` are standardised when read.

    Raises
    ------
    UsageError           fewer than two classes have samples, no label or number varies; labels, weights or widths that do not fit
    NonFiniteFeatures    X has NaN or inf; the first bad row is named
    """
    features, labels = check_labelled(X, y, len(classes), task)
    weights = _check_weights(sample_weight, len(labels))
    used = weights > NEGLIGIBLE_WEIGHT * weights.max(initial=0)
    targets = _MAKE_TARGETS[task](labels[used], weights[used])
    mean, inverse = _measure_scale(features, widths or (features.shape[1],), block_weights, standardize)
    provenance: dict[str, Any] = {"standardize": standardize, "n_train": int(used.sum())}
    if len(widths) > 1:
        provenance |= {"blocks": list(widths), "scales": block_scale_factors(widths, block_weights).tolist()}
    if standardize or len(widths) > 1:
        features = map_features(features, partial(_scale, mean=mean, inverse=inverse), np.inf)
    return Problem(
        features if used.all() else select_rows(features, np.flatnonzero(used)),
        sample_weight=weights[used] / weights[used].sum(),
        n_classes=len(targets["present"]),
        memory_bytes=int(min(memory_bytes, MEMORY_BYTES)),
        mean=mean.astype(np.float64),
        std=1 / inverse.astype(np.float64),
        classes=tuple(classes),
        task=task,
        provenance=provenance,
        **targets,
    )


def fold(
    problem: Problem, weight: Float64, bias: Float64, provenance: dict[str, Any], *, absent_logit: float | None = None
) -> LinearHead:
    """Return the head for raw features and all classes, of weights (K, D) and bias (K,) on standardised features.

    A class without training samples gets zero weights and a bias of `absent_logit`, by default 20 below the least winning
    training logit; a label that no training sample has, or that all have, gets a bias of -20 or 20.
    """
    weight, bias = problem.y_std * weight, problem.y_std * bias + problem.y_mean
    if problem.n_logits < len(problem.present):  # two classes share one logit
        half = np.array([[-0.5], [0.5]])
        weight, bias = half * weight, half[:, 0] * bias
    dtype = np.float64 if problem.task == "regression" else np.float32
    raw = np.zeros((len(problem.classes), len(problem.mean)), dtype=dtype)
    raw[problem.present] = weight / problem.std
    raw_bias = np.zeros(len(problem.classes)) + problem.absent_bias
    # with the rounded weights, so that the rounding error multiplies X - mean and not X
    raw_bias[problem.present] = bias - raw[problem.present].astype(np.float64) @ problem.mean
    absent = np.setdiff1d(np.arange(len(problem.classes)), problem.present)
    if len(absent) and problem.task == "single":
        least = affine(problem.X, weight, bias).max(axis=1).min() if absent_logit is None else absent_logit
        raw_bias[absent] = least - ABSENT_MARGIN
    return LinearHead(raw, raw_bias.astype(dtype), problem.classes, provenance, problem.task)


def _measure_scale(
    X: Features, widths: Sequence[int], block_weights: Sequence[float], standardize: bool
) -> tuple[Any, Any]:
    """Return what to subtract from the features and what to multiply them by, (D,).

    float32 is as fast as memory; float64 if float32 would overflow.

    Raises
    ------
    UsageError    blocks of these widths are not all of the features
    """
    if sum(widths) != X.shape[1]:
        raise UsageError(f"blocks of {sum(widths)} features together, expected {X.shape[1]}")
    mean, std = _mean_and_std(X) if standardize else (np.zeros(X.shape[1]), np.ones(X.shape[1]))
    columns = np.split(std, np.cumsum(widths)[:-1])
    factors = block_scale_factors(widths, block_weights)
    inverse = np.concatenate([scale / _floor(one) for scale, one in zip(factors, columns, strict=True)])
    fits = np.abs([mean, inverse, mean * inverse]).max() < FLOAT32_LIMIT and inverse.min() > 1 / FLOAT32_LIMIT
    return (mean.astype(np.float32), inverse.astype(np.float32)) if fits else (mean, inverse)


def block_scale_factors(widths: Sequence[int], weights: Sequence[float] = ()) -> Float64:
    """Return the scale of each of B blocks of D features together, float64 (B,): sqrt(D * weight / (sum of weights * width)).

    The mean squared norm of a row of standardised features times their scale is in each block proportional to its weight, by
    default the same, so that a block of 2,048 features does not dominate one of 64. Together it is that of D standardised
    features, so that l2 keeps its meaning.
    """
    shares = np.asarray(weights if len(weights) else np.ones(len(widths)))
    return np.asarray(np.sqrt(sum(widths) * shares / (shares.sum() * np.asarray(widths, dtype=np.float64))))


def _scale(x: Float32, *, mean: Any, inverse: Any) -> Float32:
    scaled = x - mean
    scaled *= inverse
    return np.asarray(scaled, dtype=np.float32)


def _single_targets(y: Int64, weights: Float64) -> dict[str, Any]:
    present, index = np.unique(y, return_inverse=True)
    if len(present) < 2:
        raise UsageError(
            f"classes with training samples: {len(present)}, expected at least 2", hint="add images of another class"
        )
    return {"y": index, "present": present}


def _multilabel_targets(y: Int64, weights: Float64) -> dict[str, Any]:
    counts = y.sum(axis=0)
    present = np.flatnonzero((counts > 0) & (counts < len(y)))
    if not len(present):
        hint = "add images with and without each label"
        raise UsageError("labels that some training images have and others lack: 0, expected at least 1", hint=hint)
    absent_bias = np.where(counts > 0, ABSENT_MARGIN, -ABSENT_MARGIN)
    return {"y": np.ascontiguousarray(y[:, present]), "present": present, "absent_bias": absent_bias}


def _regression_targets(y: Float64, weights: Float64) -> dict[str, Any]:
    if not len(y) or np.ptp(y) == 0:
        raise UsageError("training targets: one value, expected several", hint="add images with another target")
    mean = np.average(y, weights=weights)
    std = np.sqrt(np.average((y - mean) ** 2, weights=weights))
    if not MIN_TARGET_STD <= std <= 1 / MIN_TARGET_STD:
        raise UsageError(
            f"training targets vary by {np.ptp(y):.1g}, expected from {MIN_TARGET_STD:g} to {1 / MIN_TARGET_STD:g}",
            hint="use another unit",
        )
    return {"y": (y - mean) / std, "present": np.zeros(1, np.int64), "y_mean": mean, "y_std": std}


_MAKE_TARGETS: dict[str, Callable[[Any, Float64], dict[str, Any]]] = {
    "single": _single_targets,
    "multilabel": _multilabel_targets,
    "regression": _regression_targets,
}


def _mean_and_std(X: Features) -> tuple[Float64, Float64]:
    """Return mean and std of every feature, float64 (D,)."""
    mean = feature_means(X)
    squares = sum(np.square(X[rows] - mean).sum(axis=0) for rows in blocks(X))
    return mean, np.sqrt(squares / max(1, len(X)))


def _floor(std: Float64) -> Float64:
    """Return std (D,), at least 0.01 x their median, or x the median of the features that vary if most are constant."""
    varying = std[std > 0] if std.any() else np.ones(1)
    return np.maximum(std, STD_FLOOR * (np.median(std) or np.median(varying)))


def class_weights(y: ArrayLike, n_classes: int) -> Float64:
    """Return a weight for each class, float64 (C,), inverse to its count; 0 for a class without samples.

    The sample weights class_weights(y, C)[y] have mean 1.
    """
    counts = np.bincount(np.asarray(y, dtype=np.int64), minlength=n_classes)
    total = counts.sum() / max(1, np.count_nonzero(counts))
    return np.asarray(np.divide(total, counts, out=np.zeros(n_classes), where=counts > 0))


def check_labelled(X: Features, y: ArrayLike, n_classes: int, task: str = "single") -> tuple[Any, Any]:
    """Return checked features float32 (N, D), or `ChunkedFeatures`, and targets of the dtype of the task.

    Returns
    -------
    X, y    int64 (N,); for several labels int64 (N, C), 0 and 1; for numbers float64 (N,)

    Raises
    ------
    UsageError           shapes that do not fit each other, a label outside [0, n_classes), a number that is not finite
    NonFiniteFeatures    NaN or inf; the first bad row is named
    """
    with np.errstate(over="ignore"):
        features = X if isinstance(X, ChunkedFeatures) else np.asarray(X, dtype=np.float32)
    labels = _to_numbers(y, np.float64 if task == "regression" else np.int64)
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


def _to_numbers(y: ArrayLike, dtype: type) -> Any:
    """Return targets as numbers, whole ones for classes.

    Raises
    ------
    UsageError    text, or a class that is not a whole number
    """
    values = np.asarray(y)
    try:
        numbers: Any = values.astype(dtype)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"y of {values.dtype}, expected {dtype.__name__}", hint="give each class a number") from exc
    if dtype is np.int64 and values.dtype.kind == "f" and (values != numbers).any():
        row = int((values != numbers).nonzero()[0][0])
        raise UsageError(f"label {values[row]} in row {row}, expected a whole number", row=row)
    return numbers


def _check_weights(sample_weight: ArrayLike | None, n: int) -> Float64:
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise UsageError(f"sample_weight of shape {weights.shape}, expected ({n},) finite and not negative")
    return weights

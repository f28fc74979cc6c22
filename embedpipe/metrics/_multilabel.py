"""Scores where an image may have any number of labels.

>>> score_multilabel([[0.9, 0.2], [0.1, 0.8]], [[1, 0], [0, 1]])["mean_average_precision"]
1.0
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError
from embedpipe.metrics._intervals import effective_interval, wilson_interval
from embedpipe.metrics._scores import LEAST_PROBABILITY

THRESHOLD = 0.5


class MultilabelScore(TypedDict):
    """What `score_multilabel` returns; None where no class allows a value."""

    mean_average_precision: float | None
    mean_average_precision_ci95: list[float] | None
    roc_auc: float | None
    micro_f1: float | None
    macro_f1: float | None
    exact_match: float
    exact_match_ci95: list[float]
    log_loss: float
    n: int


def score_multilabel(probabilities: ArrayLike, Y: ArrayLike) -> MultilabelScore:
    """Score probabilities of labels that do not exclude each other.

    Parameters
    ----------
    probabilities : float (N, C)    each in [0, 1]; from 0.5 on the label is predicted
    Y : 0 or 1 (N, C)               the truth

    Returns
    -------
    dict
        `mean_average_precision` over the classes that occur, with its interval, `roc_auc` over those that occur and are
        absent, `micro_f1` over all cells, `macro_f1` over the classes that occur or are predicted, `exact_match` (the
        share of images with all labels right) with its Wilson interval, `log_loss` over all cells, `n`.

    Raises
    ------
    UsageError    shapes that do not fit, no sample, values that are not finite, or a truth that is not 0 or 1
    """
    from sklearn.metrics import roc_auc_score

    table, truth = _checked(probabilities, Y)
    predicted, positives, n = table >= THRESHOLD, truth.sum(axis=0), len(truth)
    occurs, varies = positives > 0, (positives > 0) & (positives < n)
    hits, total = (predicted & truth).sum(axis=0), predicted.sum(axis=0) + positives
    exact = int((predicted == truth).all(axis=1).sum())

    precision, interval = _mean_average_precision(table[:, occurs], truth[:, occurs])
    return {
        "mean_average_precision": precision,
        "mean_average_precision_ci95": interval,
        "roc_auc": _mean(np.array([roc_auc_score(truth[:, c], table[:, c]) for c in np.flatnonzero(varies)])),
        "micro_f1": float(2 * hits.sum() / total.sum()) if total.any() else None,
        "macro_f1": _mean(2 * hits[total > 0] / total[total > 0]),
        "exact_match": exact / n,
        "exact_match_ci95": list(wilson_interval(exact, n)),
        "log_loss": binary_log_loss(table, truth),
        "n": n,
    }


def binary_log_loss(probabilities: ArrayLike, Y: ArrayLike) -> float:
    """Return the mean over images and labels of binary cross-entropy; probabilities and 0 or 1, both (N, C)."""
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(Y, dtype=bool)
    return float(-np.log(np.maximum(np.where(truth, table, 1 - table), LEAST_PROBABILITY)).mean())


def _mean_average_precision(
    table: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[float | None, list[float] | None]:
    """Return the mean over classes that occur, and its interval by the infinitesimal jackknife over images."""
    if not truth.shape[1]:
        return None, None
    found = [average_precision(scores, y) for scores, y in zip(table.T, truth.T, strict=True)]
    value = float(np.mean([one for one, _ in found]))
    pull = np.mean([slope for _, slope in found], axis=0)
    return value, list(effective_interval(value, float(pull @ pull), len(truth)))


def average_precision(scores: NDArray[np.float64], y: NDArray[np.bool_]) -> tuple[float, NDArray[np.float64]]:
    """Return the average precision, and its derivative by the weight of each sample.

    The mean over positives of T / R, of all samples with a score as high or higher: positives T, and all R.

    Parameters
    ----------
    scores : float64 (N,)
    y : bool (N,)            at least one positive

    Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), section 6.
    """
    _, place = np.unique(-scores, return_inverse=True)  # 0 for the highest score, ties together
    positives = np.bincount(place, weights=y)
    T, R = np.cumsum(positives), np.cumsum(np.bincount(place))
    total = T[-1]
    value = float(positives @ (T / R) / total)
    below = [np.cumsum(one[::-1])[::-1][place] for one in (positives / R, positives * T / R**2)]
    slope = y * ((T / R)[place] - value + below[0]) - below[1]
    return value, slope / total


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _checked(probabilities: ArrayLike, Y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(Y)
    if table.ndim != 2 or table.shape != truth.shape or not table.size:
        raise UsageError(
            f"probabilities {table.shape} and labels {truth.shape}, expected both (N, C) with at least one sample"
        )
    if not np.isfinite(table).all():
        raise UsageError("a probability is not finite, expected numbers from 0 to 1")
    if not np.isin(truth, (0, 1)).all():
        raise UsageError("a label is neither 0 nor 1, expected one column a class")
    return table, truth.astype(bool)

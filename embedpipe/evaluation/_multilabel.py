"""Metrics of several labels per image.

>>> score_multilabel([[0.9, 0.2], [0.1, 0.8]], [[1, 0], [0, 1]])["mean_average_precision"]
1.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError
from embedpipe.evaluation._intervals import proportion_interval, wilson_interval
from embedpipe.evaluation._scores import negative_log

THRESHOLD = 0.5


def score_multilabel(probabilities: ArrayLike, Y: ArrayLike) -> dict[str, Any]:
    """Score the probabilities of labels that are not mutually exclusive.

    Parameters
    ----------
    probabilities : float (N, C)    each in [0, 1]; a label is predicted from 0.5 on
    Y : 0 or 1 (N, C)               true labels

    Returns
    -------
    dict
        `mean_average_precision` over the classes that occur, with its interval, `roc_auc` over the classes with positive
        and negative samples, `micro_f1` over all cells, `macro_f1` over the classes that occur or are predicted,
        `exact_match` (the share of images with all labels correct) with its Wilson interval, `log_loss` over all cells,
        `n`. A mean over classes is None if there is no such class.

    Raises
    ------
    UsageError    shapes that differ, no sample, values that are not finite, or true labels other than 0 and 1
    """
    from sklearn.metrics import roc_auc_score

    table, truth = _checked(probabilities, Y)
    predicted, positives, n = table >= THRESHOLD, truth.sum(axis=0), len(truth)
    occurs, varies = positives > 0, (positives > 0) & (positives < n)
    hits, total = (predicted & truth).sum(axis=0), predicted.sum(axis=0) + positives
    exact = int((predicted == truth).all(axis=1).sum())

    precision, interval = mean_average_precision(table[:, occurs], truth[:, occurs])
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
    """Return the mean binary cross-entropy over images and labels, for probabilities and 0 or 1, both (N, C)."""
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(Y, dtype=bool)
    return float(negative_log(np.where(truth, table, 1 - table)).mean())


def mean_average_precision(
    table: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[float | None, list[float] | None]:
    """Return the mean of the average precision over classes that occur, and its interval.

    A jackknife over images estimates the variance and the bias, which is positive for few positives. The interval is
    Wilson's around the bias-corrected value; its effective sample size is at most that of one draw per positive.
    """
    n, classes = truth.shape
    if not classes:
        return None, None
    found = [average_precision(scores, y) for scores, y in zip(table.T, truth.T, strict=True)]
    value, left_out = float(np.mean([one for one, _ in found])), np.mean([without for _, without in found], axis=0)
    variance = float((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    centre = float(np.clip(value - (n - 1) * (left_out.mean() - value), 0, 1))
    effective = classes**2 / float(np.sum(1 / truth.sum(axis=0)))
    if variance > 0 and 0 < centre < 1:
        effective = min(effective, centre * (1 - centre) / variance)
    return value, list(proportion_interval(centre, effective))


def average_precision(scores: NDArray[np.float64], y: NDArray[np.bool_]) -> tuple[float, NDArray[np.float64]]:
    """Return the average precision, and its values with each sample left out, float64 (N,).

    It is the mean over positives of T / R: R samples have a score at least as high, T of them are positive.

    Parameters
    ----------
    scores : float64 (N,)
    y : bool (N,)            at least one positive; leaving out a single positive has no effect

    Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), chapter 2.
    """
    _, place = np.unique(-scores, return_inverse=True)  # 0 for the highest score, ties together
    positives = np.bincount(place, weights=y)
    T, R = np.cumsum(positives), np.cumsum(np.bincount(place))
    fewer, total = np.maximum(R - 1, 1), T[-1]
    kept = positives * T / R
    above = (np.cumsum(kept) - kept)[place]
    without_other, without_own = (
        above + np.cumsum((positives * T_left / fewer)[::-1])[::-1][place] for T_left in (T, T - 1)
    )
    value = float(kept.sum() / total)
    own = (without_own - ((T - 1) / fewer)[place]) / (total - 1) if total > 1 else value
    return value, np.where(y, own, without_other / total)


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
        raise UsageError("a label is neither 0 nor 1, expected one column per class")
    return table, truth.astype(bool)

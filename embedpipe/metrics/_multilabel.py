"""Scores where an image may have any number of labels.

>>> score_multilabel([[0.9, 0.2], [0.1, 0.8]], [[1, 0], [0, 1]])["mean_average_precision"]
1.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError
from embedpipe.metrics._intervals import wilson_interval

THRESHOLD = 0.5


class MultilabelScore(TypedDict):
    """What `score_multilabel` returns; None where no class allows a value."""

    mean_average_precision: float | None
    roc_auc: float | None
    micro_f1: float | None
    macro_f1: float | None
    exact_match: float
    exact_match_ci95: list[float]
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
        `mean_average_precision` over the classes that occur, `roc_auc` over those that occur and are absent,
        `micro_f1` over all cells, `macro_f1` over the classes that occur or are predicted, `exact_match` (the
        share of images with all labels right) with its Wilson interval, `n`.

    Raises
    ------
    UsageError    shapes that do not fit, no sample, values that are not finite, or a truth that is not 0 or 1
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    table, truth = _checked(probabilities, Y)
    predicted, positives, n = table >= THRESHOLD, truth.sum(axis=0), len(truth)
    occurs, varies = positives > 0, (positives > 0) & (positives < n)
    hits, total = (predicted & truth).sum(axis=0), predicted.sum(axis=0) + positives
    exact = int((predicted == truth).all(axis=1).sum())

    def mean_over(classes: NDArray[np.bool_], of: Callable[..., float]) -> float | None:
        return _mean(np.array([of(truth[:, c], table[:, c]) for c in np.flatnonzero(classes)]))

    return {
        "mean_average_precision": mean_over(occurs, average_precision_score),
        "roc_auc": mean_over(varies, roc_auc_score),
        "micro_f1": float(2 * hits.sum() / total.sum()) if total.any() else None,
        "macro_f1": _mean(2 * hits[total > 0] / total[total > 0]),
        "exact_match": exact / n,
        "exact_match_ci95": list(wilson_interval(exact, n)),
        "n": n,
    }


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

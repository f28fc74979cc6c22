"""Scores of a classifier: pure functions of arrays. Any room may enter; torch stays out.

>>> score(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))["accuracy"]
1.0
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError

ECE_BINS = 15
LEAST_PROBABILITY = float(np.finfo(np.float64).eps)  # where log loss is clipped


class Score(TypedDict):
    """What `score` returns: plain numbers, ready for JSON."""

    accuracy: float
    accuracy_ci95: list[float]
    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    ece: float
    n: int


def score(probabilities: ArrayLike, y: ArrayLike, *, bins: int = ECE_BINS) -> Score:
    """Score class probabilities against the truth.

    Parameters
    ----------
    probabilities : float (N, C)    rows sum to 1
    y : int (N,)                    class index in [0, C)

    Raises
    ------
    UsageError    no sample, or a label that is no column of `probabilities`
    """
    table = np.asarray(probabilities, dtype=np.float64)
    truth = _labels(y, *table.shape)
    predicted = table.argmax(axis=1)
    confusion = confusion_matrix(truth, predicted, table.shape[1])
    correct, n = int(np.trace(confusion)), len(truth)
    return {
        "accuracy": correct / n,
        "accuracy_ci95": list(wilson_interval(correct, n)),
        "balanced_accuracy": balanced_accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "log_loss": log_loss(table, truth),
        "ece": expected_calibration_error(table.max(axis=1), predicted == truth, bins=bins),
        "n": n,
    }


def wilson_interval(correct: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    Source: Brown, Cai, DasGupta, Statistical Science 16 (2001), section 3.1.1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not exclude p itself


def confusion_matrix(y: ArrayLike, predicted: ArrayLike, n_classes: int) -> NDArray[np.int64]:
    """Count samples by truth (rows) and prediction (columns): int64 (C, C)."""
    cells = np.asarray(y, dtype=np.int64) * n_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def balanced_accuracy(confusion: NDArray[np.int64]) -> float:
    """Return the mean recall over the classes that occur."""
    support = confusion.sum(axis=1)
    present = support > 0
    return float(np.mean(np.diag(confusion)[present] / support[present]))


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """Return the mean F1 over the classes that occur or are predicted."""
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    present = total > 0
    return float(np.mean(2 * np.diag(confusion)[present] / total[present]))


def log_loss(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """Return the mean negative log probability of the truth, in nats."""
    true = probabilities[np.arange(len(y)), y]
    return float(-np.mean(np.log(np.clip(true, LEAST_PROBABILITY, 1.0))))


def expected_calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], *, bins: int = ECE_BINS
) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (a, b].

    Parameters
    ----------
    confidence : float64 (N,)    probability of the predicted class
    correct : bool (N,)          whether the prediction was right

    Source: Guo et al., ICML 2017, equation 3.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _labels(y: ArrayLike, n: int, n_classes: int) -> NDArray[np.int64]:
    truth = np.asarray(y, dtype=np.int64)
    if n == 0 or truth.shape != (n,):
        raise UsageError(f"{n} predictions and {truth.size} labels, expected as many of each and at least one")
    if truth.min() < 0 or truth.max() >= n_classes:
        wrong = int(truth[(truth < 0) | (truth >= n_classes)][0])
        raise UsageError(f"label {wrong}, expected 0 to {n_classes - 1}", label=wrong)
    return truth

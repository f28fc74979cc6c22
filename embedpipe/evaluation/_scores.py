"""Metrics of class probabilities.

>>> score(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))["accuracy"]
1.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError
from embedpipe.evaluation._calibration import expected_calibration_error
from embedpipe.evaluation._intervals import effective_interval, mean_interval, wilson_interval

TOP = 5
MIN_PROBABILITY = float(np.finfo(np.float64).eps)  # log loss clips probabilities here


def score(probabilities: ArrayLike, y: ArrayLike) -> dict[str, Any]:
    """Score class probabilities against the true classes; return plain numbers, ready for JSON.

    Parameters
    ----------
    probabilities : float (N, C)    rows sum to 1
    y : int (N,)                    class index in [0, C)

    Raises
    ------
    UsageError    no sample, or a label outside [0, C)
    """
    table, truth = _checked(probabilities, y)
    predicted = table.argmax(axis=1)
    confusion = confusion_matrix(truth, predicted, table.shape[1])
    correct, n = int(np.trace(confusion)), len(truth)
    return {
        "accuracy": correct / n,
        "accuracy_ci95": list(wilson_interval(correct, n)),
        "balanced_accuracy": balanced_accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "log_loss": log_loss(table, truth),
        "ece": expected_calibration_error(table.max(axis=1), predicted == truth),
        "n": n,
    }


def score_fully(probabilities: ArrayLike, y: ArrayLike) -> dict[str, Any]:
    """Return the metrics of `score` and further ones; raises as `score` does.

    Returns
    -------
    dict
        `balanced_accuracy_ci95`, `macro_f1_ci95` and `log_loss_ci95` (None for a single sample) are 95 % intervals. With
        more than five classes `top5`: the share of samples whose true class is among the five most probable, with
        `top5_ci95`. With two classes `roc_auc`, None if only one of them occurs.
    """
    table, truth = _checked(probabilities, y)
    n, n_classes = table.shape
    confusion = confusion_matrix(truth, table.argmax(axis=1), n_classes)
    full = {
        **score(table, truth),
        "balanced_accuracy_ci95": list(balanced_accuracy_interval(confusion)),
        "macro_f1_ci95": list(macro_f1_interval(confusion)),
        "log_loss_ci95": mean_interval(losses(table, truth), low=0.0),
    }
    if n_classes > TOP:
        full["top5"] = top_k_accuracy(table, truth, TOP)
        full["top5_ci95"] = list(wilson_interval(round(full["top5"] * n), n))
    if n_classes == 2:
        full["roc_auc"] = _roc_auc(table[:, 1], truth)
    return full


def confusion_matrix(y: ArrayLike, predicted: ArrayLike, n_classes: int) -> NDArray[np.int64]:
    """Count samples by true class (rows) and predicted class (columns): int64 (C, C)."""
    cells = np.asarray(y, dtype=np.int64) * n_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def balanced_accuracy(confusion: NDArray[np.int64]) -> float:
    """Return the mean recall over the classes that occur."""
    support = confusion.sum(axis=1)
    present = support > 0
    return float(np.mean(np.diag(confusion)[present] / support[present]))


def balanced_accuracy_interval(confusion: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of the balanced accuracy, from the binomial variance of each recall."""
    support, value = confusion.sum(axis=1), balanced_accuracy(confusion)
    present = support > 0
    n, recall = support[present], np.diag(confusion)[present] / support[present]
    single = value * (1 - value)  # a single sample gives no variance of its class
    variances = np.where(n > 1, recall * (1 - recall) / np.maximum(n - 1, 1), single)
    return effective_interval(value, float(variances.sum()) / len(n) ** 2, len(n) ** 2 / float((1 / n).sum()))


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """Return the mean F1 over the classes that occur or are predicted."""
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    present = total > 0
    return float(np.mean(2 * np.diag(confusion)[present] / total[present]))


def macro_f1_interval(confusion: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of the macro F1 by the delta method.

    A sample of class i predicted as j changes the macro F1 by ([i = j] 2 / t_i - F_i / t_i - F_j / t_j) / C to first
    order, where t_i is how often class i occurs plus how often it is predicted.

    Source: the delta method; Takahashi et al., Applied Intelligence 52 (2022).
    """
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    rows, columns = np.nonzero(confusion)
    counts, n, present = confusion[rows, columns], int(confusion.sum()), total > 0
    share = 1 / np.maximum(total, 1)
    weight = 2 * np.diag(confusion) * share * share
    terms = np.where(rows == columns, 2 * share[rows], 0) - weight[rows] - weight[columns]
    variance = float((counts * terms**2).sum()) / int(present.sum()) ** 2 * n / max(n - 1, 1)
    return effective_interval(macro_f1(confusion), variance, int(present.sum()) ** 2 / float(2 * share[present].sum()))


def log_loss(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """Return the mean negative log probability of the true class, in nats."""
    return float(np.mean(losses(probabilities, y)))


def losses(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the negative log probability of each true class, float64 (N,), in nats."""
    return negative_log(probabilities[np.arange(len(y)), y])


def negative_log(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Return -log p, in nats; finite also for probability 0."""
    return np.asarray(np.abs(np.log(np.clip(probabilities, MIN_PROBABILITY, 1.0))))


def top_k_accuracy(probabilities: NDArray[np.float64], y: NDArray[np.int64], k: int) -> float:
    """Return the share of samples whose true class is among the k most probable; ties go to the lower class index."""
    own = np.take_along_axis(probabilities, y[:, None], axis=1)
    before = np.arange(probabilities.shape[1]) < y[:, None]
    rank = (probabilities > own).sum(axis=1) + ((probabilities == own) & before).sum(axis=1)
    return float(np.mean(rank < k))


def per_class(confusion: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return one record per class; a value is None where it is undefined (no sample, or never predicted)."""
    counts = np.stack([np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)], axis=1)
    return [
        {
            "n": n,
            "precision": k / m if m else None,
            "recall": k / n if n else None,
            "recall_ci95": list(wilson_interval(k, n)) if n else None,
            "f1": 2 * k / (n + m) if n + m else None,
        }
        for k, n, m in counts.tolist()  # correct, true, predicted
    ]


def _roc_auc(scores: NDArray[np.float64], y: NDArray[np.int64]) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, scores)) if 0 < y.sum() < len(y) else None


def _checked(probabilities: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(y, dtype=np.int64)
    n, n_classes = table.shape
    if n == 0 or truth.shape != (n,):
        raise UsageError(f"{n} predictions and {truth.size} labels, expected as many of each and at least one")
    if truth.min() < 0 or truth.max() >= n_classes:
        wrong = int(truth[(truth < 0) | (truth >= n_classes)][0])
        raise UsageError(f"label {wrong}, expected 0 to {n_classes - 1}", label=wrong)
    return table, truth

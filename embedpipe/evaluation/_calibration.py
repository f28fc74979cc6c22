"""Calibration: how well confidence matches accuracy, and temperature scaling.

>>> temperature = fit_temperature(probabilities_val, y_val)
>>> calibrated = scale_temperature(probabilities_test, temperature)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ECE_BINS = 15
TEMPERATURES = (0.05, 20.0)  # smallest and largest; separable data have no optimum
TOLERANCE = 1e-10  # of the derivative of the loss
TINY = float(np.finfo(np.float64).tiny)


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Return the mean gap between confidence and accuracy over ECE_BINS equal-width bins (a, b].

    Parameters
    ----------
    confidence : float64 (N,)    probability of the predicted class
    correct : bool (N,)          whether the prediction was correct

    Source: Guo et al., ICML 2017, equation 3.
    """
    gaps = np.bincount(_bin(confidence), weights=confidence - correct)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(probabilities: ArrayLike, y: ArrayLike) -> list[dict[str, Any]]:
    """Return the bins of a reliability diagram, for probabilities float (N, C) and class indices int (N,).

    A bin is (low, high]; mean confidence and accuracy of an empty bin are None.
    """
    table = np.asarray(probabilities, dtype=np.float64)
    confidence, correct = table.max(axis=1), table.argmax(axis=1) == np.asarray(y)
    bin_ = _bin(confidence)
    counts = np.bincount(bin_, minlength=ECE_BINS).tolist()
    sums = [np.bincount(bin_, weights=values, minlength=ECE_BINS).tolist() for values in (confidence, correct)]
    return [
        {
            "low": k / ECE_BINS,
            "high": (k + 1) / ECE_BINS,
            "n": n,
            "confidence": sums[0][k] / n if n else None,
            "accuracy": sums[1][k] / n if n else None,
        }
        for k, n in enumerate(counts)
    ]


def scale_temperature(probabilities: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Return softmax(log p / T), float64 (N, C): probabilities after division of the logits by T; their order stays the same."""
    return _softmax(_logits(probabilities) / temperature)


def fit_temperature(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Return the T within `TEMPERATURES` that minimises the log loss of softmax(log p / T).

    The loss is convex in 1/T, so the root of its derivative is found by Brent's method. If the minimum is outside the
    range (for example if every sample is correct), the nearest bound is returned.

    Parameters
    ----------
    probabilities : float (N, C)    rows sum to 1
    y : int (N,)                    class index in [0, C)

    Source: Guo et al., ICML 2017, section 4.2.
    """
    from scipy.optimize import brentq

    logits = _logits(probabilities)
    own = np.take_along_axis(logits, np.asarray(y, dtype=np.int64)[:, None], axis=1)[:, 0]

    def slope(inverse: float) -> float:
        """Return the derivative of the loss with respect to 1/T."""
        return float(np.mean((_softmax(logits * inverse) * logits).sum(axis=1) - own))

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    at_low, at_high = slope(low), slope(high)
    if max(abs(at_low), abs(at_high)) <= TOLERANCE:
        return 1.0  # the loss does not depend on the temperature
    if at_low >= -TOLERANCE or at_high <= TOLERANCE:
        return TEMPERATURES[1 if at_low >= -TOLERANCE else 0]
    return float(1 / brentq(slope, low, high, xtol=1e-13))


def _bin(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def _logits(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Return log p, finite also where p is 0."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), TINY)))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))

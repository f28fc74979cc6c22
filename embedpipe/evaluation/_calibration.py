"""Is 0.9 right nine times in ten, and which temperature makes it so.

>>> temperature = fit_temperature(probabilities_val, y_val)
>>> calibrated = soften(probabilities_test, temperature)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ECE_BINS = 15
TEMPERATURES = (0.05, 20.0)  # the least and the largest: separable data have no optimum
TOLERANCE, STEPS = 1e-10, 100
TINY = float(np.finfo(np.float64).tiny)


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
    gaps = np.bincount(_place(confidence, bins), weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(probabilities: ArrayLike, y: ArrayLike) -> list[dict[str, Any]]:
    """Return the bins of a reliability diagram, for probabilities float (N, C) and class indices int (N,).

    A bin is (low, high]; its mean confidence and accuracy are None where it is empty.
    """
    table = np.asarray(probabilities, dtype=np.float64)
    confidence, correct = table.max(axis=1), table.argmax(axis=1) == np.asarray(y)
    place = _place(confidence, ECE_BINS)
    counts = np.bincount(place, minlength=ECE_BINS).tolist()
    sums = [np.bincount(place, weights=values, minlength=ECE_BINS).tolist() for values in (confidence, correct)]
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


def soften(probabilities: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Return softmax(log p / T), float64 (N, C): the probabilities of the logits divided by T; the order stays."""
    return _softmax(_logits(probabilities) / temperature)


def fit_temperature(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Return the T in `TEMPERATURES` that minimises the log loss of softmax(log p / T).

    The loss is convex in 1/T: Newton's steps, bisected where they leave the bracket. Where no T in the
    range is the best (every sample right, say), the bound itself is returned.

    Parameters
    ----------
    probabilities : float (N, C)    rows sum to 1
    y : int (N,)                    class index in [0, C)

    Source: Guo et al., ICML 2017, section 4.2.
    """
    logits = _logits(probabilities)
    own = np.take_along_axis(logits, np.asarray(y, dtype=np.int64)[:, None], axis=1)[:, 0]

    def slopes(inverse: float) -> tuple[float, float]:
        """Return the first and second derivative of the loss by 1/T."""
        p = _softmax(logits * inverse)
        mean = (p * logits).sum(axis=1)
        return float(np.mean(mean - own)), float(np.mean((p * (logits - mean[:, None]) ** 2).sum(axis=1)))

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    at_low, at_high = slopes(low)[0], slopes(high)[0]
    if max(abs(at_low), abs(at_high)) <= TOLERANCE:
        return 1.0  # every temperature is as good
    if at_low >= -TOLERANCE or at_high <= TOLERANCE:
        return TEMPERATURES[1 if at_low >= -TOLERANCE else 0]
    inverse = 1.0
    for _ in range(STEPS):
        first, second = slopes(inverse)
        if abs(first) <= TOLERANCE:
            break
        low, high = (low, inverse) if first > 0 else (inverse, high)
        step = inverse - first / second if second > 0 else low
        inverse = step if low < step < high else (low + high) / 2
    return 1 / inverse


def _place(confidence: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _logits(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Return log p, finite also where p is 0."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), TINY)))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))

"""Metrics of regression.

>>> score_regression([1.0, 2.0, 3.5], [1.0, 2.0, 3.0])["mae"]
0.1666...
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError
from embedpipe.evaluation._intervals import mean_interval


def score_regression(predicted: ArrayLike, y: ArrayLike) -> dict[str, Any]:
    """Score predicted numbers against the truth.

    Parameters
    ----------
    predicted : float (N,)
    y : float (N,)

    Returns
    -------
    dict
        `r2` = 1 - sum of squared errors / sum of squares around the mean of y, `mae`, `rmse` in the unit of y, each
        with its 95 % interval, `spearman`'s rank correlation (ties get their mean rank), `n`. `r2` and `spearman` are
        None if the predictions or the targets are constant, intervals are None for a single sample.

    Raises
    ------
    UsageError    shapes that differ, no sample, or values that are not finite
    """
    guess, truth = _checked(predicted, y)
    squares, errors = (guess - truth) ** 2, np.abs(guess - truth)
    mse = mean_interval(squares, low=0.0)
    r2, r2_interval = _r2(squares, truth)
    return {
        "r2": r2,
        "r2_ci95": r2_interval,
        "mae": float(errors.mean()),
        "mae_ci95": mean_interval(errors, low=0.0),
        "rmse": sqrt(squares.mean()),
        "rmse_ci95": mse and [sqrt(end) for end in mse],
        "spearman": _spearman(guess, truth),
        "n": len(truth),
    }


def _r2(squares: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float | None, list[float] | None]:
    """Return R2 and its interval by the delta method, clipped at 1."""
    around = (y - y.mean()) ** 2
    if not around.any():
        return None, None
    r2 = float(1 - squares.sum() / around.sum())
    return r2, mean_interval(r2 - (squares - (1 - r2) * around) / around.mean(), high=1.0)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    from scipy.stats import spearmanr

    return None if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def _checked(predicted: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if guess.ndim != 1 or guess.shape != truth.shape or not guess.size:
        raise UsageError(
            f"predictions {guess.shape} and values {truth.shape}, expected both (N,) with at least one sample"
        )
    if not (np.isfinite(guess).all() and np.isfinite(truth).all()):
        raise UsageError("a value is not finite, expected numbers")
    return guess, truth

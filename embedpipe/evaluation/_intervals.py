"""95 % intervals that cover: of proportions, of means, and of what is averaged over classes. No resampling, no seed.

A plain percentile bootstrap covers too little at some hundred samples, because counts near their bound and losses are
skewed. `pytest -s tests/metrics/test_coverage.py` prints what these cover.

>>> wilson_interval(81, 263)
(0.255..., 0.366...)
"""

from __future__ import annotations

from math import exp, lgamma, log, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

Z = NormalDist().inv_cdf((1 + 0.95) / 2)  # half the width of a 95 % interval, in standard deviations


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    Source: Brown, Cai, DasGupta, Statistical Science 16 (2001), section 3.1.1.
    """
    p, shrink = correct / n, 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / shrink
    half = Z / shrink * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not exclude p itself


def effective_interval(value: float, variance: float, n: float) -> tuple[float, float]:
    """Return Wilson's interval with as many samples as give a proportion of this value the variance of the estimate.

    Parameters
    ----------
    value : float       in [0, 1], an average of proportions
    variance : float    of the estimate
    n : float           taken where value or variance say nothing: all right, or all wrong

    Source: Franco, Little, Louis, Slud, Journal of Survey Statistics and Methodology 7 (2019).
    """
    inside = 0 < value < 1 and variance > 0
    effective = value * (1 - value) / variance if inside else n
    return wilson_interval(value * effective, effective)


def mean_interval(values: ArrayLike) -> list[float] | None:
    """Return the t interval of a mean, corrected for skewness; None for one value.

    It is what the studentised bootstrap gives to second order.

    Parameters
    ----------
    values : float (N,)    losses, differences of losses, errors

    Source: Hall, JRSS B 54 (1992), "On the removal of skewness by transformation".
    """
    sample = np.asarray(values, dtype=np.float64)
    n, mean = len(sample), float(np.mean(sample))
    if n < 2:
        return None
    scale = float(sample.std(ddof=1))
    if scale <= 1e-12 * abs(mean):
        return [mean, mean]
    skewness = float(np.mean(((sample - mean) / scale) ** 3))
    quantile = _t_quantile(n - 1)
    low, high = (mean - scale / sqrt(n) * _untransformed(q, skewness, n) for q in (quantile, -quantile))
    return [low, high]


def paired_interval(b: int, c: int, n: int) -> tuple[float, float]:
    """Return the interval of the difference (c - b) / n of two proportions on the same samples.

    Half a sample is added to each cell of the table: without, few disagreements cover too little.

    Parameters
    ----------
    b, c : int    samples that only the first, and only the second, has right
    n : int       samples

    Source: Agresti, Min, Statistics in Medicine 24 (2005).
    """
    p, q = (b + 0.5) / (n + 2), (c + 0.5) / (n + 2)
    half = Z * sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(-1.0, q - p - half), min(1.0, q - p + half)


def mcnemar(b: int, c: int) -> float:
    """Return the p value of the exact McNemar test: the two-sided binomial test of b in b + c at 1/2.

    Source: McNemar, Psychometrika 12 (1947); Fagerland, Lydersen, Laake, BMC Medical Research Methodology 13 (2013).
    """
    n, least = b + c, min(b, c)
    if 2 * least == n:
        return 1.0
    terms = (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2) for k in range(least + 1))
    return min(1.0, 2 * sum(exp(term) for term in terms))


def _untransformed(x: float, skewness: float, n: int) -> float:
    """Return T where x = T + a T^2 + a^2 T^3 / 3 + a / 2, with a = skewness / (3 sqrt n)."""
    a = skewness / (3 * sqrt(n))
    if abs(a) < 1e-9:
        return x
    return float(np.cbrt(1 + 3 * a * (x - a / 2)) - 1) / a


def _t_quantile(freedom: int) -> float:
    """Return the quantile of Student's t by its expansion around the normal one.

    Source: Abramowitz, Stegun, 26.7.5.
    """
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + (Z**3 + Z) / (4 * freedom) + second / freedom**2

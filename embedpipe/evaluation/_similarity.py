"""Similarity of two representations of the same images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def linear_cka(X: NDArray[np.floating], Y: NDArray[np.floating]) -> float:
    """Return the linear CKA of X (N, D) and Y (N, E): 1 if they are equal up to rotation and scale, near 0 if unrelated.

    It is biased upwards if N is small compared with D and E, and NaN if X or Y is constant.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    X, Y = (one.astype(np.float64) - one.mean(axis=0, dtype=np.float64) for one in (X, Y))
    across, own, other = (np.square(a.T @ b).sum() for a, b in ((X, Y), (X, X), (Y, Y)))
    with np.errstate(invalid="ignore"):
        return float(across / np.sqrt(own * other))

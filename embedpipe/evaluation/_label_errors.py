"""Confident learning: labels that contradict confident out-of-fold predictions.

>>> rows, suggested, scores = find_label_errors(probabilities, y)

Source: Northcutt, Jiang, Chuang, JAIR 70 (2021), sections 3.1 and 3.2; its selection by the joint's own cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

MAX_DOUBT = 0.1  # a label below this probability (and below chance) is suspected even if no class is confident


def find_label_errors(probabilities: Float64, y: Int64) -> tuple[Int64, Int64, Float64]:
    """Return the samples off the diagonal of the confident joint, and those whose label has a very low probability.

    A class is confident for a sample if its probability is at least the class's self-confidence: the mean of that
    probability over the samples with this label. The most probable confident class is the suggestion. A sample is suspected
    if the suggestion differs from its label and is more probable. If the label is ruled out (probability below MAX_DOUBT and
    below chance) and no class is confident, the most probable class is the suggestion.

    Parameters
    ----------
    probabilities : float64 (N, C)    out of fold
    y : int64 (N,)                    given label, in [0, C)

    Returns
    -------
    rows : int64 (m,)         suspected samples, the most suspicious first
    suggested : int64 (m,)    a more probable class
    scores : float64 (m,)     (1 - normalised margin) / 2, in [0.5, 1]; 1: certainly another class
    """
    rows, limit = np.arange(len(y)), min(MAX_DOUBT, 1 / probabilities.shape[1])
    threshold = self_confidence(probabilities, y)
    known = np.where(np.isfinite(threshold), probabilities, -1.0)
    confident = np.where(probabilities >= threshold, probabilities, -1.0)
    ruled_out = (confident.max(axis=1) < 0) & (probabilities[rows, y] < limit)
    suggested = np.where(ruled_out, known.argmax(axis=1), confident.argmax(axis=1))
    sure = ruled_out | (confident.max(axis=1) >= 0)
    margin = probabilities[rows, y] - probabilities[rows, suggested]
    suspected = np.flatnonzero(sure & (suggested != y) & (margin < 0))
    suspected = suspected[np.argsort(margin[suspected], kind="stable")]
    return suspected, suggested[suspected], (1 - margin[suspected]) / 2


def self_confidence(probabilities: Float64, y: Int64) -> Float64:
    """Return the mean probability of each class over the samples with this label, float64 (C,); infinite without samples."""
    counts = np.bincount(y, minlength=probabilities.shape[1])
    sums = np.bincount(y, probabilities[np.arange(len(y)), y], minlength=probabilities.shape[1])
    return np.asarray(np.divide(sums, counts, out=np.full(len(counts), np.inf), where=counts > 0))

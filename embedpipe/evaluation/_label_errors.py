"""Confident learning: which labels contradict what heads that have not seen them are confident of. Pure functions of arrays.

>>> found = find_label_errors(probabilities, y)
>>> y[found.rows], found.suggested, found.score

Source: Northcutt, Jiang, Chuang, JAIR 70 (2021), sections 3.1 and 3.2; its selection by the joint's own cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

LEAST_BELIEF = 0.1  # a label of less probability (and less than chance) is suspected though no class is confident


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """Suspected label errors, the most suspicious first.

    rows : int64 (m,)
    suggested : int64 (m,)    the class that is likelier
    score : float64 (m,)      (1 - normalised margin) / 2, in [0.5, 1]: 1 is surely another class
    """

    rows: Int64
    suggested: Int64
    score: Float64


def find_label_errors(probabilities: Float64, y: Int64) -> LabelErrors:
    """Return the samples off the diagonal of the confident joint, and those whose label is less likely than `disbelief`.

    A class counts as confident for a sample where its probability is at least the mean self-confidence of the class, the mean
    of that probability over the samples labelled so: a class that heads doubt in general asks for less. The likeliest
    confident class is the suggestion, and a sample is suspected where that is not its label, and is likelier. Where heads rule
    the label out without being sure of another class, the likeliest class is the suggestion.

    Parameters
    ----------
    probabilities : float64 (N, C)    out of fold
    y : int64 (N,)                    given label, in [0, C)
    """
    rows, disbelief = np.arange(len(y)), min(LEAST_BELIEF, 1 / probabilities.shape[1])
    threshold = self_confidence(probabilities, y)
    known = np.where(np.isfinite(threshold), probabilities, -1.0)
    confident = np.where(probabilities >= threshold, probabilities, -1.0)
    ruled_out = (confident.max(axis=1) < 0) & (probabilities[rows, y] < disbelief)
    suggested = np.where(ruled_out, known.argmax(axis=1), confident.argmax(axis=1))
    sure = ruled_out | (confident.max(axis=1) >= 0)
    margin = probabilities[rows, y] - probabilities[rows, suggested]
    suspected = np.flatnonzero(sure & (suggested != y) & (margin < 0))
    suspected = suspected[np.argsort(margin[suspected], kind="stable")]
    return LabelErrors(suspected, suggested[suspected], (1 - margin[suspected]) / 2)


def self_confidence(probabilities: Float64, y: Int64) -> Float64:
    """Return the mean probability of each class over the samples labelled so, float64 (C,); infinite for a class without any."""
    counts = np.bincount(y, minlength=probabilities.shape[1])
    sums = np.bincount(y, probabilities[np.arange(len(y)), y], minlength=probabilities.shape[1])
    return np.asarray(np.divide(sums, counts, out=np.full(len(counts), np.inf), where=counts > 0))

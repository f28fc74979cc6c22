"""Views: cached augmentations of the train images as additional training rows.

Each image has a weight of 1 in all: half of it on the clean row, and the other half on the rows of its views. Held-out images
are always clean.

>>> views = read_views(features, samples, max_bytes=4e9)
>>> X, y, sample_weight = training_rows(X, y, views)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.heads import Features, Float64, Int64, select_rows, stack_rows

if TYPE_CHECKING:
    from embedpipe.data import Sample
    from embedpipe.features import FeatureSet

CLEAN_SHARE = 0.5  # of the weight of an image with views

Views = tuple[Features, Int64]  # rows (V, D), and the index of the training row (V,) whose image each of them shows


def read_views(features: FeatureSet, samples: Sequence[Sample], *, max_bytes: float) -> Views | None:
    """Return the cached views of the images of some samples, as additions to their rows; None without views."""
    found = features.views()
    parts, image = [], []
    for view in found:
        known = {sample.key for sample in view.samples()}
        seen = [number for number, sample in enumerate(samples) if sample.key in known]
        parts.append(view.rows(tuple(samples[number] for number in seen), max_bytes=max_bytes / (1 + len(found))))
        image += seen
    return (reduce(stack_rows, parts), np.array(image, dtype=np.int64)) if image else None


def training_rows(
    X: Features, y: NDArray[Any], views: Views | None, weights: Float64 | None = None
) -> tuple[Features, NDArray[Any], Float64 | None]:
    """Return rows, targets and sample weights to fit on: clean rows X (N, D), then views (V, D).

    weights : float64 (N,) or None    of the images
    """
    if views is None:
        return X, y, weights
    rows, image = views
    counts, own = np.bincount(image, minlength=len(y)), np.ones(len(y)) if weights is None else weights
    clean = np.where(counts > 0, CLEAN_SHARE, 1.0) * own
    of_views = (1 - CLEAN_SHARE) * own[image] / counts[image]
    return stack_rows(X, rows), np.concatenate([y, y[image]]), np.concatenate([clean, of_views])


def select_views(views: Views | None, rows: Int64) -> Views | None:
    """Return the views of some training rows with the rising indices (n,), as additions to these rows."""
    if views is None:
        return None
    own = np.flatnonzero(np.isin(views[1], rows))
    return (select_rows(views[0], own), np.searchsorted(rows, views[1][own])) if len(own) else None

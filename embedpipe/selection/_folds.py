"""Cross-validation: each labelled sample is predicted by a head that was fitted without it, its copies and its group.

>>> result = predict_out_of_fold(features, HeadConfig(features.classes), folds=5)
>>> result.probabilities.shape, result.labels.shape
((1400, 10), (1400,))
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embedpipe.data import Sample, connected_components
from embedpipe.heads import Features, Float64, Int64, select_rows
from embedpipe.selection._fold_assignment import assign_folds
from embedpipe.selection._views import Views, read_views, select_views

if TYPE_CHECKING:
    from embedpipe.features import FeatureSet
    from embedpipe.selection._head_configuration import HeadConfig

INNER_FOLDS = 5  # one of these folds of a training part selects l2, or all if one is small


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Predictions of N samples by heads that were fitted without them.

    samples : N Sample
    labels : int64 (N,)              class index
    fold : int64 (N,)                fold in which the sample was held out
    probabilities : float64 (N, C)
    l2 : list of float or None       of the head of each fold; None for kNN
    """

    samples: tuple[Sample, ...]
    labels: Int64
    fold: Int64
    probabilities: Float64
    l2: list[float | None]


def predict_out_of_fold(
    features: FeatureSet,
    config: HeadConfig,
    *,
    folds: int = 5,
    splits: Sequence[str] = ("train", "val"),
    seed: int = 0,
    views: bool = False,
) -> OutOfFold:
    """Predict each labelled sample of some splits by a head that was fitted without it.

    views : bool    whether heads are fitted on the cached views of their training images, too

    Raises
    ------
    UsageError           fewer separate samples than folds, or a fold without two classes
    NonFiniteFeatures    NaN or inf in the features
    """
    samples = tuple(s for s in features.samples(labelled=True) if s.split in splits)
    index = {name: number for number, name in enumerate(config.classes)}
    y = np.array([index[s.label or ""] for s in samples], dtype=np.int64)
    groups = connected_components(samples)
    X = config.rows(features, samples)
    extra = read_views(features, samples, max_bytes=config.max_bytes) if views else None
    return OutOfFold(samples, y, *cross_fit(X, y, groups, config, folds=folds, seed=seed, views=extra))


def cross_fit(
    X: Features,
    y: Int64,
    groups: Sequence[Hashable],
    config: HeadConfig,
    *,
    folds: int,
    seed: int,
    views: Views | None = None,
) -> tuple[Int64, Float64, list[float | None]]:
    """Predict each fold with a head fitted on the other folds.

    The l2 of a fold is selected within its training part, on one inner fold of INNER_FOLDS, or on all of them if one is
    small, and fitted again on the whole training part. A held-out sample thus takes no part in selecting the head that
    predicts it, and the accuracy over all samples is not optimistic (nested cross-validation).

    Parameters
    ----------
    X : float32 (N, D)
    y : int64 (N,)         class index
    groups : N hashable    rows of one group stay in one fold
    views : optional       additions to the training rows

    Returns
    -------
    fold : int64 (N,)
    probabilities : float64 (N, C)
    l2 : list of float    of each fold; None for kNN

    Source: Varma and Simon, BMC Bioinformatics 7:91 (2006).
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    group = np.array([numbers[name] for name in groups], dtype=np.int64)
    fold = assign_folds(y, group, folds=folds, seed=seed)
    probabilities = np.empty((len(y), len(config.classes)))
    selected: list[float | None] = []
    for number in range(folds):
        held_out, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        X_rest, X_held_out = select_rows(X, rest), select_rows(X, held_out)
        own = select_views(views, rest)
        l2 = _select_l2(X_rest, y[rest], group[rest], config, seed=seed, views=own)
        probabilities[held_out] = config.fit(X_rest, y[rest], l2=l2, views=own).predict_proba(X_held_out)
        selected.append(l2)
    return fold, probabilities, selected


def _select_l2(
    X: Features, y: Int64, group: Int64, config: HeadConfig, *, seed: int, views: Views | None
) -> float | None:
    """Return the l2 that scores best on an inner fold of a training part, or on all inner folds."""
    if not config.selects_l2:
        return None if config.solver == "knn" else float(config.l2)
    inner = assign_folds(y, group, folds=INNER_FOLDS, seed=seed) == 0
    rest, held_out = np.flatnonzero(~inner), np.flatnonzero(inner)
    order = np.concatenate([rest, held_out])
    rows = select_rows(X, rest), y[rest], select_rows(X, held_out), y[held_out]
    return config.select(*rows, group=group[order], views=select_views(views, rest)).l2

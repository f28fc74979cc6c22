"""Fold assignment: which rows of train and val are held out together, stratified by class, groups and copies in one fold.

>>> folds = selection_folds(X, y, content_groups(samples), views=None, weigh=lambda y: None, max_bytes=4e9)
>>> path = fit_path(X, y, None, None, classes=classes, folds=folds)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.data import Sample, connected_components, position
from embedpipe.errors import UsageError
from embedpipe.heads import ChunkedFeatures, Features, Fold, Int64, select_rows
from embedpipe.selection._views import Views, select_views, training_rows

FOLDS = 5  # of train and val, which select l2 where val is small
MIN_VAL, MIN_VAL_PER_CLASS = 50, 2  # images of val below which folds of train and val select
STACKED_COPIES = 10  # of the features, that folds in memory take


def needs_folds(y_val: ArrayLike, n_classes: int) -> bool:
    """Return whether val is too small to select on: targets (n,), or (n, C) of 0 and 1."""
    truth = np.asarray(y_val)
    return len(truth) < MIN_VAL or (truth.sum() if truth.ndim == 2 else len(truth)) < MIN_VAL_PER_CLASS * n_classes


def selection_folds(
    X: Features,
    y: NDArray[Any],
    group: Int64,
    *,
    views: Views | None,
    weigh: Callable[[NDArray[Any]], NDArray[Any] | None],
    max_bytes: float,
) -> list[Fold]:
    """Return FOLDS folds of rows (N, D), or as many as there are groups.

    Folds are left out if their training part has one class, or none of the classes that are held out.

    Parameters
    ----------
    group : int64 (N,)    rows of one number stay together; in the order of the numbers they are assigned
    views : optional      additions to some rows; they are training rows only
    weigh : y -> float64 (n,) or None    weights of training images
    """
    count = min(FOLDS, len(np.unique(group)))
    if count < 2:
        return []
    codes = np.unique(y, axis=0, return_inverse=True)[1].reshape(-1)
    fold, made = assign_folds(codes, group, folds=count, seed=None), []
    if isinstance(X, np.ndarray) and STACKED_COPIES * X.nbytes > max_bytes:
        X = ChunkedFeatures(X.shape, X.__getitem__)
    for number in range(count):
        rest, held_out = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if (y[rest] != y[rest[0]]).any() and (y.ndim == 2 or np.isin(y[held_out], y[rest]).any()):
            own = select_views(views, rest)
            X_fit, y_fit, weights = training_rows(select_rows(X, rest), y[rest], own, weigh(y[rest]))
            made.append(Fold(X_fit, y_fit, select_rows(X, held_out), y[held_out], weights))
    return made


def content_groups(samples: Sequence[Sample]) -> Int64:
    """Return a number for each sample, the same for copies and groups, in an order that depends on their content only."""
    names = connected_components(samples)
    rank = {name: number for number, name in enumerate(sorted(set(names), key=position))}
    return np.array([rank[name] for name in names], dtype=np.int64)


def assign_folds(y: Int64, group: Int64, *, folds: int, seed: int | None) -> Int64:
    """Assign each row to a fold, int64 (N,): stratified by class, rows of one group together.

    Groups are assigned in random order, or in the order of their numbers if `seed` is None, the largest first, each to the
    fold that has the fewest samples of its classes.

    Parameters
    ----------
    y : int64 (N,)        class index
    group : int64 (N,)    rows of one number stay together

    Raises
    ------
    UsageError    fewer than 2 folds, or fewer groups than folds
    """
    by_group = np.argsort(group, kind="stable")
    _, starts = np.unique(group[by_group], return_index=True)
    members = np.split(by_group, starts[1:]) if len(by_group) else []  # the rows of each group
    if not 2 <= folds <= len(members):
        raise UsageError(
            f"{folds} folds of {len(members)} separate images (copies and groups stay together), "
            f"expected 2 to {len(members)}",
            hint="choose fewer --folds, or extract more images",
        )
    order = range(len(members)) if seed is None else np.random.default_rng(seed % 2**64).permutation(len(members))
    counts: list[Counter[int]] = [Counter() for _ in range(folds)]
    totals = [0] * folds
    fold = np.empty(len(y), np.int64)
    for rows in sorted((members[index] for index in order), key=len, reverse=True):
        labels = Counter(y[rows].tolist())
        overlap = [sum(n * count[label] for label, n in labels.items()) for count in counts]
        best = min(range(folds), key=lambda number: (overlap[number], totals[number]))
        counts[best].update(labels)
        totals[best] += len(rows)
        fold[rows] = best
    return fold

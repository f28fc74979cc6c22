"""Folds: every labelled sample predicted by a head that has seen neither it, nor a copy of it, nor its group.

>>> done = out_of_fold(features, Recipe(features.classes), folds=5)
>>> done.probabilities.shape, done.labels.shape
((1400, 10), (1400,))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.data import Sample, components
from embedpipe.errors import UsageError
from embedpipe.heads import Chunked, Gram, some_of

if TYPE_CHECKING:
    from embedpipe.features import FeatureSet
    from embedpipe.selection._head_configuration import Recipe

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

INNER = 5  # of the training part of a fold, one in INNER chooses l2


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """What heads say of samples that they have not seen.

    samples : N Sample
    labels : int64 (N,)              class index
    fold : int64 (N,)                the fold that held the sample out
    probabilities : float64 (N, C)   by the head of that fold
    l2 : list of float or None       of each fold's head
    """

    samples: tuple[Sample, ...]
    labels: Int64
    fold: Int64
    probabilities: Float64
    l2: list[float | None]


def out_of_fold(
    features: FeatureSet, recipe: Recipe, *, folds: int = 5, splits: Sequence[str] = ("train", "val"), seed: int = 0
) -> OutOfFold:
    """Return class probabilities of the labelled samples of some splits, each by a head fitted without it.

    Raises
    ------
    UsageError           fewer separate samples than folds, or a fold without two classes to learn
    NonFiniteFeatures    NaN or inf in the features
    """
    samples = tuple(s for s in features.samples(labelled=True) if s.split in splits)
    number = {name: index for index, name in enumerate(recipe.classes)}
    y = np.array([number[s.label or ""] for s in samples], dtype=np.int64)
    ties = components(samples)
    fold, probabilities, l2 = cross_fit(recipe.rows(features, samples), y, ties, recipe, folds=folds, seed=seed)
    return OutOfFold(samples, y, fold, probabilities, l2)


def cross_fit(
    X: NDArray[Any] | Chunked, y: Int64, ties: Sequence[Hashable], recipe: Recipe, *, folds: int, seed: int
) -> tuple[Int64, Float64, list[float | None]]:
    """Predict each fold with a head fitted on the others.

    The l2 of a fold is chosen inside its own training part: one in INNER of it is held out once more, cut in the same way,
    the path over l2 is fitted on the rest, and the l2 that is best there is fitted again on the whole training part. So no
    held-out sample has had a say in the head that predicts it, and the accuracy over all of them is not optimistic. One l2 for
    all folds, the best on average over the held-out samples, would save a fit a fold, and report the score that it was chosen by.

    Parameters
    ----------
    X : float32 (N, D)
    y : int64 (N,)      class index
    ties : N names      rows of the same name stay in one fold

    Returns
    -------
    fold : int64 (N,)
    probabilities : float64 (N, C)
    l2 : list of float    of each fold; None for knn
    """
    numbers: dict[Hashable, int] = {}
    tie = np.array([numbers.setdefault(one, len(numbers)) for one in ties], dtype=np.int64)
    fold = assign_folds(y, tie, folds=folds, seed=seed)
    probabilities = np.empty((len(y), len(recipe.classes)))
    chosen: list[float | None] = []
    whole = recipe.gram(X, y)
    for number in range(folds):
        held, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        part, unseen = some_of(X, rest), some_of(X, held)
        gram = _without(whole, unseen, y[held], recipe)
        l2 = _choose(part, y[rest], tie[rest], recipe, seed=seed, gram=gram)
        probabilities[held] = recipe.fit(part, y[rest], l2=l2, gram=gram).predict_proba(unseen)
        chosen.append(l2)
    return fold, probabilities, chosen


def _choose(
    X: NDArray[Any] | Chunked, y: Int64, tie: Int64, recipe: Recipe, *, seed: int, gram: Gram | None
) -> float | None:
    """Return the l2 that is best on an inner part held out of the training part of a fold."""
    if not recipe.chooses:
        return None if recipe.solver == "knn" else float(recipe.l2)
    inner = assign_folds(y, tie, folds=INNER, seed=seed) == 0
    rest, held = np.flatnonzero(~inner), np.flatnonzero(inner)
    unseen = some_of(X, held)
    gram = _without(gram, unseen, y[held], recipe)
    return recipe.choose(some_of(X, rest), y[rest], unseen, y[held], gram=gram).l2


def _without(gram: Gram | None, X: NDArray[Any] | Chunked, y: Int64, recipe: Recipe) -> Gram | None:
    """Return the Gram of the other rows, if there is one to take these from."""
    part = gram and recipe.gram(X, y, origin=gram.origin)
    return gram - part if gram and part else None


def assign_folds(y: Int64, tie: Int64, *, folds: int, seed: int) -> Int64:
    """Give every row a fold, int64 (N,): classes spread evenly, rows of one tie together.

    Ties are dealt in random order, the largest first, each to the fold that has least of its classes.

    Parameters
    ----------
    y : int64 (N,)      class index
    tie : int64 (N,)    rows of the same number stay together

    Raises
    ------
    UsageError    fewer than 2 folds, or fewer ties than folds
    """
    parts = _members(tie)
    if not 2 <= folds <= len(parts):
        raise UsageError(
            f"{folds} folds of {len(parts)} separate images (copies and groups stay together), expected 2 to {len(parts)}",
            hint="ask for as many --folds, or extract more images",
        )
    order = np.random.default_rng(seed % 2**64).permutation(len(parts)).tolist()
    counts: list[Counter[int]] = [Counter() for _ in range(folds)]
    totals = [0] * folds
    fold = np.empty(len(y), np.int64)
    for part in sorted((parts[index] for index in order), key=len, reverse=True):
        labels = Counter(y[part].tolist())

        def load(number: int, labels: Counter[int] = labels) -> tuple[int, int]:
            return sum(count * counts[number][label] for label, count in labels.items()), totals[number]

        best = min(range(folds), key=load)
        counts[best].update(labels)
        totals[best] += len(part)
        fold[part] = best
    return fold


def _members(tie: Int64) -> list[Int64]:
    """Return the rows of each tie."""
    order = np.argsort(tie, kind="stable")
    _, starts = np.unique(tie[order], return_index=True)
    return np.split(order, starts[1:]) if len(order) else []

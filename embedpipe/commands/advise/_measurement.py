"""What a data set says of itself: heads on every layer, on shares of the data, kNN, labels that heads contradict, copies.

Every accuracy is out of fold over train and val: each image is judged by a head that has seen neither it, nor a copy of it, nor
its group. l2 is the one that is best on val for a head on train. Test is only searched for copies of earlier splits; none of its
labels is read.

>>> evidence = measure(features, seed=0)
>>> evidence.best.layers, evidence.best.accuracy, evidence.slope.gain
(('blocks.5',), 0.975, 0.021)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.data import Sample
from embedpipe.evaluation import find_label_errors, paired_interval, wilson_interval
from embedpipe.features import FeatureSet
from embedpipe.heads import KnnHead, LinearHead, fit_knn
from embedpipe.selection import (
    SPLIT_ORDER,
    HeadConfig,
    OutOfFold,
    find_exact,
    find_groups,
    find_near,
    group_leaks,
    predict_out_of_fold,
)

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Fit = Callable[[NDArray[Any], Int64], KnnHead | LinearHead]

FOLDS = 5
HALF, SHARES = 0.5, (0.25, 0.5)  # of the training part of each fold, beside all of it
NEAR_BEST = 0.75  # layers that are tried together: those whose accuracy is so much of the best, both above chance
MOST_IMAGES = 20_000  # of train and val that are judged: the first by content, which is a random sample
FREE_L2 = 1e-6  # so small that only the features limit how well a head fits its own images


@dataclass(frozen=True)
class Difference:
    """How much more often one way is right than another on the same images, with its 95 % interval."""

    gain: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, right: Bools, other: Bools) -> Difference:
        b, c = int((other & ~right).sum()), int((right & ~other).sum())
        return cls((c - b) / len(right), paired_interval(b, c, len(right)))


@dataclass(frozen=True)
class Counted:
    """So many of n images: their share with its 95 % interval, and which they are."""

    n: int
    share: float
    ci95: tuple[float, float]
    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Sequence[str], n: int) -> Counted:
        return cls(n, len(paths) / n, wilson_interval(len(paths), n), tuple(paths)) if n else cls(0, 0.0, (0.0, 1.0))


@dataclass(frozen=True)
class HeadEvidence:
    """A head on one layer or on several: its l2, its accuracy, by how much it differs from the last layer's, and what it took."""

    layers: tuple[str, ...]
    dim: int
    l2: float
    accuracy: float
    difference: Difference
    seconds: float


@dataclass(frozen=True)
class Evidence:
    """All that is measured.

    n_train, n_val : int               labelled images
    n_judged : int                     of them, out of fold
    chance : float                     accuracy of always naming the largest class
    layers : tuple of HeadEvidence     in the order of the model; what enters the classifier comes last
    several : HeadEvidence             the best layers and the last one together
    curve : {images: accuracy}         heads on the last layer, fitted on shares of the images
    slope : Difference                 all images against half of them
    separable : float                  accuracy on the very images that a head on the last layer is fitted on, without penalty
    knn : float                        accuracy of the 20 nearest neighbours on the last layer
    wrong_labels : Counted             of the images of which heads and neighbours say the same, those that are labelled otherwise
    leaked : Counted                   of the images of val and test, those that an earlier split has too
    """

    n_train: int
    n_val: int
    n_classes: int
    n_judged: int
    chance: float
    layers: tuple[HeadEvidence, ...]
    several: HeadEvidence
    curve: dict[int, float]
    slope: Difference
    separable: float
    knn: float
    wrong_labels: Counted
    leaked: Counted

    @property
    def last(self) -> HeadEvidence:
        return self.layers[-1]

    @property
    def best(self) -> HeadEvidence:
        """The layer with the best head; the later one of equals."""
        return max(reversed(self.layers), key=lambda one: one.accuracy)

    @property
    def beats_chance(self) -> bool:
        """Whether a head is right more often, beyond chance, than always naming the largest class."""
        accuracy = max(self.best.accuracy, self.several.accuracy)
        return wilson_interval(round(accuracy * self.n_judged), self.n_judged)[0] > self.chance

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Judged:
    """Images of some layers, judged out of fold; how long the choice of l2 took, as `fit-head` makes it."""

    features: FeatureSet
    config: HeadConfig
    out: OutOfFold
    seconds: float

    @cached_property
    def guess(self) -> Int64:
        return np.asarray(self.out.probabilities.argmax(axis=1))

    @cached_property
    def right(self) -> Bools:
        return np.asarray(self.guess == self.out.labels)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def X(self) -> NDArray[Any]:
        """float32 (N, D) of the images, in their order."""
        return self.features.read(self.out.samples)

    def against(self, last: Judged) -> HeadEvidence:
        layers = tuple(space.spec["layer"] for space in self.features.spaces)
        difference = Difference.of(self.right, last.right)
        return HeadEvidence(
            layers, self.features.feature_dim, float(self.config.l2), self.accuracy, difference, self.seconds
        )


def measure(features: FeatureSet, *, seed: int = 0) -> Evidence:
    """Measure a data set whose layers are cached.

    Parameters
    ----------
    features : FeatureSet    several layers of one model, in its order; what enters the classifier comes last

    Raises
    ------
    UsageError    fewer separate images than folds
    """
    some = _some(features)
    alone = [judge(some.only([space]), seed) for space in some.spaces]
    last = alone[-1]
    chance = float(np.bincount(last.out.labels).max() / len(last.out.labels))
    best = max(reversed(alone), key=lambda one: one.accuracy)
    near = [one.features.space for one in alone if one is last or is_near(one.accuracy, best.accuracy, chance)]
    several = judge(some.only(near), seed)
    X, y = last.X, last.out.labels
    shares = {share: _learn(last, share, seed) == y for share in SHARES}
    neighbours = _refit(last, partial(fit_knn, classes=features.classes), seed=seed)
    wrong, agreed = find_wrong(y, [best.guess, last.guess, several.guess, neighbours], several)
    count, name = Counter(sample.split for sample in features.samples(labelled=True)), features.manifest.name_of
    fitted = round(len(y) * (FOLDS - 1) / FOLDS)
    return Evidence(
        n_train=count["train"],
        n_val=count["val"],
        n_classes=len(features.classes),
        n_judged=len(y),
        chance=chance,
        layers=tuple(one.against(last) for one in alone),
        several=several.against(last),
        curve={round(fitted * share): float(right.mean()) for share, right in {**shares, 1.0: last.right}.items()},
        slope=Difference.of(last.right, shares[HALF]),
        separable=float(np.mean(last.config.fit(X, y, l2=FREE_L2).predict_proba(X).argmax(axis=1) == y)),
        knn=float(np.mean(neighbours == y)),
        wrong_labels=Counted.of([name(last.out.samples[row]) for row in wrong], agreed),
        leaked=Counted.of([name(sample) for sample in find_copies(features)], count["val"] + count["test"]),
    )


def is_near(accuracy: float, best: float, chance: float) -> bool:
    """Whether a head is nearly as good as the best one."""
    return accuracy - chance >= NEAR_BEST * (best - chance)


def judge(features: FeatureSet, seed: int) -> Judged:
    """Choose l2 on val for a head on train, and judge both splits out of fold with it."""
    config, start = HeadConfig(features.classes, widths=features.widths), time.monotonic()
    fitted = config.select(*features.arrays("train"), *features.arrays("val"))
    config, seconds = replace(config, l2=fitted.l2 or 0.0), time.monotonic() - start
    return Judged(features, config, predict_out_of_fold(features, config, folds=FOLDS, seed=seed), seconds)


def find_wrong(y: Int64, guesses: Sequence[Int64], judged: Judged) -> tuple[list[int], int]:
    """Return the rows whose label contradicts what all heads and kNN agree on, and on how many rows they agree.

    Hard images are what heads disagree about, so these say little of the labels. A contradiction counts where the
    confident joint suspects the label, too.
    """
    same = np.logical_and.reduce([guess == guesses[0] for guess in guesses])
    suspected = set(find_label_errors(judged.out.probabilities, y).rows.tolist())
    return [row for row in np.flatnonzero(same & (guesses[0] != y)).tolist() if row in suspected], int(same.sum())


def find_copies(features: FeatureSet) -> list[Sample]:
    """Return the images of val and test that an earlier split has too: by content, by features of the last layer, by group."""
    samples = [sample for sample in features.samples() if sample.split in SPLIT_ORDER]
    near = find_near(features.only(features.spaces[-1:]))
    leaks = (*find_exact(samples), *near.leaks, *group_leaks(samples, find_groups(samples)))
    return sorted({leak.sample for leak in leaks}, key=lambda sample: sample.path)


def _some(features: FeatureSet) -> FeatureSet:
    """Return train and val alone, at most MOST_IMAGES of them."""
    samples = [s for s in features.samples(labelled=True) if s.split in ("train", "val")]
    samples = sorted(samples, key=lambda sample: sample.key)[:MOST_IMAGES]
    return replace(features, manifest=replace(features.manifest, samples=tuple(samples)))


def _learn(judged: Judged, share: float, seed: int) -> Int64:
    """Return what linear heads on a share of the images say.

    The strength of the penalty against all images together stays, so l2 grows as the share falls.
    """
    return _refit(judged, partial(judged.config.fit, l2=float(judged.config.l2) / share), share=share, seed=seed)


def _refit(judged: Judged, fit: Fit, *, share: float = 1.0, seed: int) -> Int64:
    """Return what heads on a share of each class say of the folds that they have not seen, int64 (N,)."""
    rng, X, y, fold = np.random.default_rng(seed % 2**64), judged.X, judged.out.labels, judged.out.fold
    guess = np.empty(len(y), np.int64)
    for number in range(FOLDS):
        rows = rng.permutation(np.flatnonzero(fold != number))
        classes = [rows[y[rows] == c] for c in np.unique(y[rows])]
        drawn = np.concatenate([mine[: max(1, round(share * len(mine)))] for mine in classes])
        guess[fold == number] = fit(X[drawn], y[drawn]).predict_proba(X[fold == number]).argmax(axis=1)
    return guess

"""Measure a data set: heads on every layer and on shares of the data, kNN, labels that heads contradict, copies.

Every accuracy is out of fold over train and val: the head that predicts an image was fitted without it, its copies and its
group. l2 is the one that is best on val for a head on train. Test is only searched for copies of earlier splits; none of its
labels is read.

>>> evidence = measure(features, seed=0)
>>> evidence.best.layers, evidence.best.accuracy, evidence.slope.gain
(('blocks.5',), 0.975, 0.021)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    find_near,
    group_leaks,
    predict_out_of_fold,
)

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]

FOLDS = 5
HALF, SHARES = 0.5, (0.25, 0.5)  # of the training part of each fold
NEAR_BEST = 0.75  # of the best accuracy, both above chance: layers that are combined
MOST_IMAGES = 20_000  # of train and val: the first by content, which is a random sample
FREE_L2 = 1e-6  # so small that only the features limit the training accuracy


@dataclass(frozen=True)
class Difference:
    """Difference in accuracy on the same images, with its 95 % interval."""

    gain: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, right: Bools, other: Bools) -> Difference:
        b, c = int((other & ~right).sum()), int((right & ~other).sum())
        return cls((c - b) / len(right), paired_interval(b, c, len(right)))


@dataclass(frozen=True)
class Counted:
    """Some of n images: their share with its 95 % interval, and their paths."""

    n: int
    share: float
    ci95: tuple[float, float]
    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Sequence[str], n: int) -> Counted:
        return cls(n, len(paths) / n, wilson_interval(len(paths), n), tuple(paths)) if n else cls(0, 0.0, (0.0, 1.0))


@dataclass(frozen=True)
class HeadEvidence:
    """A head on one layer or several: its l2, its accuracy, the difference to the last layer's, and the time to fit it."""

    layers: tuple[str, ...]
    dim: int
    l2: float
    accuracy: float
    difference: Difference
    seconds: float


@dataclass(frozen=True)
class Evidence:
    """The measurements.

    n_train, n_val : int               labelled images
    n_judged : int                     of them, predicted out of fold
    chance : float                     accuracy of always predicting the largest class
    layers : tuple of HeadEvidence     in the order of the model; the penultimate one is the last
    several : HeadEvidence             the best layers and the last one combined
    curve : {images: accuracy}         of heads on the last layer, fitted on shares of the images
    slope : Difference                 all images against half of them
    separable : float                  training accuracy of a head on the last layer, without penalty
    knn : float                        accuracy of the 20 nearest neighbours on the last layer
    wrong_labels : Counted             of the images on which heads and neighbours agree, those that have another label
    leaked : Counted                   of the images of val and test, those that are also in an earlier split
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
        """The layer with the best head; of equal ones the later."""
        return max(reversed(self.layers), key=lambda head: head.accuracy)

    @property
    def beats_chance(self) -> bool:
        """Whether a head is significantly better than always predicting the largest class."""
        accuracy = max(self.best.accuracy, self.several.accuracy)
        return wilson_interval(round(accuracy * self.n_judged), self.n_judged)[0] > self.chance


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Out-of-fold predictions of heads on some layers, and the seconds that `fit-head` takes to choose their l2."""

    features: FeatureSet
    config: HeadConfig
    out: OutOfFold
    seconds: float

    @cached_property
    def predicted(self) -> Int64:
        return np.asarray(self.out.probabilities.argmax(axis=1))

    @cached_property
    def correct(self) -> Bools:
        return np.asarray(self.predicted == self.out.labels)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def X(self) -> NDArray[Any]:
        """float32 (N, D) of the images, in their order."""
        return self.features.read(self.out.samples)

    def compare(self, last: CrossValidated) -> HeadEvidence:
        """Return the accuracy of these heads, also relative to heads on the last layer."""
        features, l2, difference = self.features, float(self.config.l2), Difference.of(self.correct, last.correct)
        return HeadEvidence(features.layers, features.feature_dim, l2, self.accuracy, difference, self.seconds)

    def refit(self, fit: Callable[..., KnnHead | LinearHead], *, share: float = 1.0, seed: int) -> Int64:
        """Return the out-of-fold predictions int64 (N,) of heads that are fitted on a share of each class."""
        rng, X, y, fold = np.random.default_rng(seed % 2**64), self.X, self.out.labels, self.out.fold
        predicted = np.empty(len(y), np.int64)
        for number in range(FOLDS):
            rows = rng.permutation(np.flatnonzero(fold != number))
            classes = [rows[y[rows] == c] for c in np.unique(y[rows])]
            drawn = np.concatenate([members[: max(1, round(share * len(members)))] for members in classes])
            predicted[fold == number] = fit(X[drawn], y[drawn]).predict_proba(X[fold == number]).argmax(axis=1)
        return predicted


def measure(features: FeatureSet, *, seed: int = 0) -> Evidence:
    """Measure a data set whose layers are cached.

    Parameters
    ----------
    features : FeatureSet    the layers of one model, in its order; the penultimate one is the last

    Raises
    ------
    UsageError    fewer separate images than folds
    """
    count, name = Counter(sample.split for sample in features.samples(labelled=True)), features.manifest.display_name
    subset = _train_and_val(features)
    layers = [cross_validate(subset.only([space]), seed) for space in subset.spaces]
    last, best = layers[-1], max(reversed(layers), key=lambda layer: layer.accuracy)
    y = last.out.labels
    chance = float(np.bincount(y).max() / len(y))
    used = [layer for layer in layers if layer is last or is_near(layer.accuracy, best.accuracy, chance)]
    several = cross_validate(subset.only(layer.features.space for layer in used), seed)
    correct = {}
    for share in SHARES:
        fit = partial(last.config.fit, l2=float(last.config.l2) / share)  # the same total penalty on fewer images
        correct[share] = last.refit(fit, share=share, seed=seed) == y
    correct[1.0] = last.correct
    neighbours = last.refit(partial(fit_knn, classes=features.classes), seed=seed)
    wrong, agreed = find_wrong(y, [best.predicted, last.predicted, several.predicted, neighbours], several)
    n_fitted = round(len(y) * (FOLDS - 1) / FOLDS)
    return Evidence(
        n_train=count["train"],
        n_val=count["val"],
        n_classes=len(features.classes),
        n_judged=len(y),
        chance=chance,
        layers=tuple(layer.compare(last) for layer in layers),
        several=several.compare(last),
        curve={round(n_fitted * share): float(correct[share].mean()) for share in correct},
        slope=Difference.of(last.correct, correct[HALF]),
        separable=float(np.mean(last.config.fit(last.X, y, l2=FREE_L2).predict_proba(last.X).argmax(axis=1) == y)),
        knn=float(np.mean(neighbours == y)),
        wrong_labels=Counted.of([name(last.out.samples[row]) for row in wrong], agreed),
        leaked=Counted.of([name(sample) for sample in find_copies(features)], count["val"] + count["test"]),
    )


def is_near(accuracy: float, best: float, chance: float) -> bool:
    """Return True if a head is nearly as good as the best one."""
    return accuracy - chance >= NEAR_BEST * (best - chance)


def cross_validate(features: FeatureSet, seed: int) -> CrossValidated:
    """Choose l2 on val for a head on train, and predict both splits out of fold with it."""
    config, start = HeadConfig(features.classes, widths=features.widths), time.monotonic()
    fitted = config.select_on(features)
    config, seconds = replace(config, l2=fitted.l2 or 0.0), time.monotonic() - start
    return CrossValidated(features, config, predict_out_of_fold(features, config, folds=FOLDS, seed=seed), seconds)


def find_wrong(y: Int64, predictions: Sequence[Int64], heads: CrossValidated) -> tuple[Int64, int]:
    """Return the rows whose label contradicts the prediction of all heads and kNN, and the number of rows where they agree.

    Heads disagree on difficult images, so these say little about the labels. A contradiction counts if confident learning
    suspects the label, too.
    """
    agree = np.logical_and.reduce([one == predictions[0] for one in predictions])
    suspected = find_label_errors(heads.out.probabilities, y)[0]
    return np.intersect1d(np.flatnonzero(agree & (predictions[0] != y)), suspected), int(agree.sum())


def find_copies(features: FeatureSet) -> list[Sample]:
    """Return the val and test images that are also in an earlier split: by content, by last-layer features, or by group."""
    samples = [sample for sample in features.samples() if sample.split in SPLIT_ORDER]
    near, _, _ = find_near(features.only(features.spaces[-1:]))
    leaks = (*find_exact(samples), *near, *group_leaks(samples))
    return sorted({leak.sample for leak in leaks}, key=lambda sample: sample.path)


def _train_and_val(features: FeatureSet) -> FeatureSet:
    """Return train and val without test, at most MOST_IMAGES of them."""
    samples = [s for s in features.samples(labelled=True) if s.split in ("train", "val")]
    return select_samples(features, sorted(samples, key=lambda sample: sample.key)[:MOST_IMAGES])


def select_samples(features: FeatureSet, samples: Iterable[Sample]) -> FeatureSet:
    """Return the data set with some of its samples only."""
    return replace(features, manifest=replace(features.manifest, samples=tuple(samples)))

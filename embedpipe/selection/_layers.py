"""Ranking: which spaces of a data set a head is best fitted on, one alone or several side by side; val decides, test is not read.

Every space is measured with a head of its own, l2 tuned. Several earn their place only by a gain over the last layer that
is beyond the noise of val; the last layer wins ties.

>>> [one["layer"] for one in choose_space(features, fit).report["ranking"]]
['layer3', 'penultimate', 'layer2']
>>> choose_blocks(features, fit).features.widths
(256, 512)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.evaluation import losses
from embedpipe.features import PENULTIMATE, FeatureSet
from embedpipe.heads import Path, block_scales

DRAWS, SEED = 10_000, 0  # of the bootstrap

Fit = Callable[[FeatureSet], Path]


@dataclass(frozen=True, eq=False)
class Ranked:
    """The head that val chose on some spaces, and what it gives there.

    features : FeatureSet
    path : Path
    probabilities : float64 (n, C) of the val split
    y : int64 (n,)
    """

    features: FeatureSet
    path: Path
    probabilities: NDArray[np.float64]
    y: NDArray[np.int64]

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.probabilities.argmax(axis=1) == self.y)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Negative log probability of the truth of each sample."""
        return losses(self.probabilities, self.y)

    @property
    def log_loss(self) -> float:
        return float(self.losses.mean())

    @property
    def merit(self) -> tuple[float, float]:
        return self.accuracy, -self.log_loss

    @property
    def least_loss(self) -> float:
        """The lowest log loss on the path over l2: smoother than that of the point with the best accuracy."""
        return min(point.val_log_loss for point in self.path.points if point.val_log_loss is not None)

    def to_dict(self) -> dict[str, Any]:
        return {"l2": self.path.l2, "val_accuracy": self.accuracy, "val_log_loss": self.log_loss}


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which spaces val chose: the features of these alone, and what is reported of the choice."""

    features: FeatureSet
    report: dict[str, Any]


def rank(features: FeatureSet, fit: Fit) -> Ranked:
    """Fit a head on all columns of `features` and look at val."""
    path = fit(features)
    X, y = features.arrays("val")
    return Ranked(features, path, path.head.predict_proba(X), y)


def rank_spaces(features: FeatureSet, fit: Fit) -> list[Ranked]:
    """Fit a head on each space alone, in the order of the columns."""
    return [rank(features.only([space]), fit) for space in features.spaces]


def choose_space(features: FeatureSet, fit: Fit) -> Chosen:
    """Return the space whose head has the highest accuracy on val (ties: the lowest log loss), and the table of all."""
    ranked = rank_spaces(features, fit)
    best = max(ranked, key=lambda one: one.merit)
    return Chosen(best.features, {"ranking": describe_ranking(ranked)})


def describe_ranking(ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """Return a record a space, the best first.

    `difference` is its accuracy on val less that of the best, with the 95 % interval of a paired bootstrap.
    """
    ordered = sorted(ranked, key=lambda one: one.merit, reverse=True)
    table = []
    for one in ordered:
        difference, interval = paired_difference(one.right, ordered[0].right)
        about = {**_space_of(one), **one.to_dict(), "difference": difference, "difference_ci95": interval}
        table.append({**about, "chosen": one is ordered[0]})
    return table


def choose_blocks(features: FeatureSet, fit: Fit) -> Chosen:
    """Choose among the spaces of `features` by forward selection, and let the result prove itself against the last layer.

    The last layer is what enters the classifier, else the last one in the order of the model; of several backbones, the one
    that does best on val. The others are tried in the order of their own log loss on val, and stay where the log loss
    of the head on all that stays becomes lower: two fits a space. Whether the result then replaces the last layer
    is told by `is_beyond_noise`.
    """
    ranked = rank_spaces(features, fit)
    last = max(_last_layers(ranked), key=lambda one: one.merit)
    grown = last
    for one in sorted((one for one in ranked if one is not last), key=lambda one: one.least_loss):
        kept = {*(space.folder for space in grown.features.spaces), one.features.space.folder}
        tried = rank(features.only(space for space in features.spaces if space.folder in kept), fit)
        grown = tried if tried.least_loss < grown.least_loss else grown
    wins = is_beyond_noise(grown, last)
    winner = grown if wins else last
    return Chosen(winner.features, _describe_blocks(features, ranked, winner, last=last, grown=grown))


def is_beyond_noise(new: Ranked, old: Ranked) -> bool:
    """Whether a head is better on val than another by more than noise: more answers are right, and that or the loss shows it.

    Of the samples on which the two disagree, `gained` - `lost` - 1 >= sqrt(gained + lost): McNemar's statistic with
    continuity correction at one standard error. Or the mean difference of log loss is two standard errors and more: it
    moves long before answers do, but alone it proves nothing about them.
    """
    gained, lost = int((new.right & ~old.right).sum()), int((old.right & ~new.right).sum())
    saved = old.losses - new.losses
    surer = saved.mean() >= 2 * saved.std() / math.sqrt(len(saved))
    return gained > lost and bool(surer or gained - lost - 1 >= math.sqrt(gained + lost))


def paired_difference(right: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[float, list[float]]:
    """Return how much more often `right` (n,) holds than `other` (n,), with the 95 % interval of a paired bootstrap."""
    n = len(right)
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    shares = [gained / n, lost / n, 1 - (gained + lost) / n]
    draws = np.random.default_rng(SEED).multinomial(n, shares, DRAWS)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return (gained - lost) / n, [float(low), float(high)]


def _last_layers(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Return the last layer of each backbone: spaces of one stand together, in its order."""
    last: dict[str, Ranked] = {}
    for one in ranked:
        spec = one.features.space.spec
        model = f"{spec['source']}:{spec['architecture']}:{spec['weights']}"
        if model not in last or last[model].features.space.spec["layer"] != PENULTIMATE:
            last[model] = one
    return list(last.values())


def _describe_blocks(
    features: FeatureSet, ranked: Sequence[Ranked], winner: Ranked, *, last: Ranked, grown: Ranked
) -> dict[str, Any]:
    kept = [space.folder for space in winner.features.spaces]
    widths = winner.features.widths
    scales = dict(zip(kept, block_scales(widths).tolist(), strict=True)) if len(kept) > 1 else {}
    blocks = [
        {**_space_of(one), **one.to_dict(), "scale": scales.get(folder), "chosen": folder in kept}
        for one, folder in zip(ranked, (space.folder for space in features.spaces), strict=True)
    ]
    gain, interval = paired_difference(grown.right, last.right)
    layers = [space.spec["layer"] for space in grown.features.spaces]
    decision = {
        "chosen": "last" if winner is last else "blocks",
        "last": {"layer": last.features.space.spec["layer"], **last.to_dict()},
        "blocks": {"layers": layers, **grown.to_dict()},
        "gain": gain,
        "gain_ci95": interval,
    }
    return {"blocks": blocks, "decision": decision}


def _space_of(one: Ranked) -> dict[str, Any]:
    space = one.features.space
    spec = space.spec
    return {
        "space": space.folder.name,
        "backbone": f"{spec['source']}:{spec['architecture']}",
        "layer": spec["layer"],
        "pool": spec["pool"],
        "dim": one.features.feature_dim,
    }

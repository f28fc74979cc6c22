"""Selection of the rows of a head: which layers, one or several side by side, and whether with views of the train images.

A head with its own l2 is fitted on each space. Held-out images are those of val, or of folds where val is small. Best is the
lowest log loss, or with `select="accuracy"` the highest accuracy. Other spaces replace the last layer only where the gain
exceeds its noise. The test split is not read.

>>> best, report = select_space(features, config)
>>> [row["layer"] for row in report["ranking"]]
['layer3', 'penultimate', 'layer2']
>>> select_blocks(features, config)[0].features.widths
(256, 512)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.errors import UsageError
from embedpipe.features import PENULTIMATE, FeatureSet
from embedpipe.heads import L2Path, block_scale_factors
from embedpipe.selection._head_configuration import HeadConfig
from embedpipe.selection._views import read_views

BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 10_000, 0
MIN_GAIN = 0.01  # of the log loss, in nats
NEAR = 10  # a factor: how far the l2 with views may be from the one without
BLOCK_WEIGHTS = (1.0, 0.25, 4.0)  # of a block that is added, relative to those that are there


@dataclass(frozen=True, eq=False)
class Candidate:
    """A head fitted on some spaces.

    features : FeatureSet    of these spaces
    config : HeadConfig      with the width and the weight of each space
    path : L2Path            with the losses of the held-out images
    """

    features: FeatureSet
    config: HeadConfig
    path: L2Path

    @classmethod
    def fit(cls, features: FeatureSet, config: HeadConfig, weights: Sequence[float] = ()) -> Candidate:
        config = replace(config, widths=features.widths, block_weights=tuple(weights))
        return cls(features, config, config.select_on(features))

    @property
    def score(self) -> tuple[float, float]:
        """Negative log loss and accuracy, the one that selects first: higher is better."""
        scores = -float(self.path.losses.mean()), float(self.path.correct.mean())
        return scores if self.config.selection == "log-loss" else scores[::-1]

    @property
    def weights(self) -> dict[Any, float]:
        """Weight of the block of each space, by the folder of the space."""
        folders = [space.folder for space in self.features.spaces]
        return dict(zip(folders, self.config.block_weights or [1.0] * len(folders), strict=True))

    def to_dict(self) -> dict[str, Any]:
        accuracy, loss = float(self.path.correct.mean()), float(self.path.losses.mean())
        return {
            "layers": list(self.features.layers),
            "l2": self.path.l2,
            "val_accuracy": accuracy,
            "val_log_loss": loss,
        }

    def describe(self, than: Candidate) -> dict[str, Any]:
        """Return the record of a candidate on one space, and how it differs from another one."""
        space = self.features.space
        return {
            "space": space.folder.name,
            "backbone": f"{space.spec['source']}:{space.spec['architecture']}",
            "layer": space.spec["layer"],
            "pool": space.spec["pool"],
            "dim": self.features.feature_dim,
            **self.to_dict(),
            **compare_paths(self.path, than.path),
        }


def select_space(features: FeatureSet, config: HeadConfig) -> tuple[Candidate, dict[str, Any]]:
    """Select the space with the best score; return its head and the ranking, each space compared with the best one."""
    ranked = sorted(_fit_each(features, config), key=lambda candidate: candidate.score, reverse=True)
    return ranked[0], {"ranking": [{**one.describe(ranked[0]), "chosen": one is ranked[0]} for one in ranked]}


def select_blocks(features: FeatureSet, config: HeadConfig) -> tuple[Candidate, dict[str, Any]]:
    """Select the last layer, the best single one, or several side by side; return the head and the report.

    The last layer is the penultimate one, or else the last in model order; of several backbones, the one with the best
    score. Several layers are found by forward selection: from the best layer on, the others are tried in the order of their
    own score, each with three weights, and added where the joint head has a better score. The best layer replaces the last
    one, and several layers replace that, where `is_beyond_noise`.
    """
    candidates = _fit_each(features, config)
    last = max(_last_layers(candidates), key=lambda one: one.score)
    ranked = sorted(candidates, key=lambda one: (one.score, one is last), reverse=True)
    single = blocks = ranked[0]
    for candidate in ranked[1:]:
        joint = [_join(features, blocks, candidate, weight) for weight in BLOCK_WEIGHTS]
        blocks = max([blocks, *joint], key=lambda one: one.score)
    winner = last
    for candidate in (single, blocks):
        winner = candidate if is_beyond_noise(candidate.path, winner.path, config.selection) else winner
    names = {id(blocks): "blocks", id(single): "single", id(last): "last"}
    scales = dict(
        zip(winner.weights, block_scale_factors(winner.features.widths, winner.config.block_weights), strict=True)
    )
    rows = [
        {**one.describe(last), "scale": scales.get(folder) if len(scales) > 1 else None, "chosen": folder in scales}
        for one, folder in ((one, one.features.space.folder) for one in candidates)
    ]
    decision = {"chosen": names[id(winner)], "last": last.to_dict(), "single": single.to_dict()}
    return winner, {
        "blocks": rows,
        "decision": {**decision, "blocks": blocks.to_dict(), **compare_paths(blocks.path, last.path)},
    }


def try_views(candidate: Candidate) -> tuple[L2Path, dict[str, Any] | None]:
    """Fit again with the cached views of the train images, and keep that if the log loss of held-out images is lower.

    The l2 with views is selected within a factor of NEAR of the one without: two free selections on few images would be noisy.

    Returns
    -------
    The better path, and a dict, or None if there are no views or the solver does not use them
        augment, seed, count : of the views
        used : bool
        val_log_loss, val_log_loss_without : of the held-out images with and without views; None if no images are held out
    """
    features, config, path = candidate.features, candidate.config, candidate.path
    samples = features.labelled_samples("train")
    views = read_views(features, samples, max_bytes=config.max_bytes) if config.uses_views else None
    if views is None:
        return path, None
    found = features.views()
    transform = found[0].space.spec["transform"]
    report = {"augment": transform["augment"], "seed": transform["seed"], "count": len(found), "used": False}
    if not len(path.losses):
        return path, {**report, "val_log_loss": None, "val_log_loss_without": None}
    if config.selects_l2 and path.l2:  # views do not change the scale of the objective
        near = tuple(l2 for l2 in config.grid if path.l2 / NEAR <= l2 <= path.l2 * NEAR)
        config = replace(config, grid=near)
    augmented = config.select_on(features, views=views)
    losses = [float(one.losses.mean()) for one in (augmented, path)]
    report |= {"used": losses[0] < losses[1], "val_log_loss": losses[0], "val_log_loss_without": losses[1]}
    return augmented if report["used"] else path, report


def _fit_each(features: FeatureSet, config: HeadConfig) -> list[Candidate]:
    """Fit a head on each space alone, in column order.

    Raises
    ------
    UsageError    no image is held out
    """
    candidates = [Candidate.fit(features.only([space]), config) for space in features.spaces]
    if not len(candidates[0].path.losses):
        hint = "name one --layer, or add val/ images"
        raise UsageError(f"{features.manifest.name} has no validation samples to select layers on", hint=hint)
    return candidates


def _join(features: FeatureSet, blocks: Candidate, new: Candidate, weight: float) -> Candidate:
    """Fit a head on the spaces of two candidates, in column order."""
    weights = {**blocks.weights, new.features.space.folder: weight}
    spaces = [space for space in features.spaces if space.folder in weights]
    return Candidate.fit(features.only(spaces), new.config, [weights[space.folder] for space in spaces])


def is_beyond_noise(new: L2Path, old: L2Path, select: str = "log-loss") -> bool:
    """Return True if `new` predicts the held-out images better than `old` by more than noise.

    The mean log loss must be lower by at least MIN_GAIN and one standard error of the paired difference. By accuracy,
    McNemar's statistic with continuity correction must be at least one standard error: gained - lost - 1 >=
    sqrt(gained + lost), over the images on which the two disagree.

    Source: McNemar, Psychometrika 12 (1947).
    """
    if select == "log-loss":
        saved = old.losses - new.losses
        return bool(saved.mean() >= max(MIN_GAIN, saved.std() / math.sqrt(len(saved))))
    gained, lost = int((new.correct & ~old.correct).sum()), int((old.correct & ~new.correct).sum())
    return gained - lost - 1 >= math.sqrt(gained + lost)


def compare_paths(new: L2Path, old: L2Path) -> dict[str, Any]:
    """Return the paired differences on the same held-out images, new less old, with 95 % bootstrap intervals."""
    difference, interval = paired_difference(new.correct, old.correct)
    saved = new.losses - old.losses
    half = 1.96 * float(saved.std()) / math.sqrt(len(saved))
    loss = float(saved.mean())
    return {
        "difference": difference,
        "difference_ci95": interval,
        "loss_difference": loss,
        "loss_difference_ci95": [loss - half, loss + half],
    }


def paired_difference(correct: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[float, list[float]]:
    """Return the difference in accuracy of two predictors on the same samples, with a 95 % paired bootstrap interval.

    Parameters
    ----------
    correct, other : bool (n,)    whether each prediction is correct
    """
    n = len(correct)
    gained, lost = int((correct & ~other).sum()), int((other & ~correct).sum())
    shares = [gained / n, lost / n, 1 - (gained + lost) / n]
    draws = np.random.default_rng(BOOTSTRAP_SEED).multinomial(n, shares, BOOTSTRAP_DRAWS)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return (gained - lost) / n, [float(low), float(high)]


def _last_layers(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the last layer of each backbone; the spaces of one backbone are adjacent and in model order."""
    last: dict[str, Candidate] = {}
    for candidate in candidates:
        spec = candidate.features.space.spec
        model = f"{spec['source']}:{spec['architecture']}:{spec['weights']}"
        if model not in last or last[model].features.space.spec["layer"] != PENULTIMATE:
            last[model] = candidate
    return list(last.values())

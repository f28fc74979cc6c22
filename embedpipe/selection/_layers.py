"""Layer selection: on which cached spaces of a data set, one or several side by side, a head scores best on val.

A head with its own l2 is fitted on each space. Several spaces replace the last layer only where the gain on val exceeds
its noise; ties go to the last layer. The test split is not read.

>>> best, report = select_space(features, fit)
>>> [row["layer"] for row in report["ranking"]]
['layer3', 'penultimate', 'layer2']
>>> select_blocks(features, fit)[0].widths
(256, 512)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.evaluation import losses
from embedpipe.features import PENULTIMATE, FeatureSet
from embedpipe.heads import L2Path, block_scale_factors

BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 10_000, 0

Fit = Callable[[FeatureSet], L2Path]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A head fitted on some spaces, and how it predicts val.

    features : FeatureSet    of these spaces
    path : L2Path
    correct : bool (n,)      whether each prediction is correct
    losses : float64 (n,)    negative log probability of the true class
    """

    features: FeatureSet
    path: L2Path
    correct: NDArray[np.bool_]
    losses: NDArray[np.float64]

    @property
    def score(self) -> tuple[float, float]:
        """Accuracy, then negative log loss: higher is better."""
        return float(self.correct.mean()), -float(self.losses.mean())

    @property
    def lowest_loss(self) -> float:
        """Lowest log loss along the path over l2; less noisy than the loss at the most accurate point."""
        return float(self.losses.mean())

    def to_dict(self) -> dict[str, Any]:
        return {"l2": self.path.l2, "val_accuracy": self.score[0], "val_log_loss": -self.score[1]}

    def describe(self) -> dict[str, Any]:
        """Return the record of a candidate on one space."""
        space = self.features.space
        return {
            "space": space.folder.name,
            "backbone": f"{space.spec['source']}:{space.spec['architecture']}",
            "layer": space.spec["layer"],
            "pool": space.spec["pool"],
            "dim": self.features.feature_dim,
            **self.to_dict(),
        }


def _evaluate(features: FeatureSet, fit: Fit) -> Candidate:
    """Fit a head on all columns of `features` and predict val."""
    path = fit(features)
    X, y = features.arrays("val")
    probabilities = path.head.predict_proba(X)
    return Candidate(features, path, probabilities.argmax(axis=1) == y, losses(probabilities, y))


def _evaluate_each(features: FeatureSet, fit: Fit) -> list[Candidate]:
    """Fit a head on each space alone, in column order."""
    return [_evaluate(features.only([space]), fit) for space in features.spaces]


def select_space(features: FeatureSet, fit: Fit) -> tuple[FeatureSet, dict[str, Any]]:
    """Select the space with the highest accuracy on val (ties: the lowest log loss); return its features and the ranking.

    In the ranking, `difference` is a space's accuracy minus the best one's, with a 95 % paired bootstrap interval.
    """
    ranked = sorted(_evaluate_each(features, fit), key=lambda candidate: candidate.score, reverse=True)
    table = []
    for candidate in ranked:
        difference, interval = paired_difference(candidate.correct, ranked[0].correct)
        row = {**candidate.describe(), "difference": difference, "difference_ci95": interval}
        table.append({**row, "chosen": candidate is ranked[0]})
    return ranked[0].features, {"ranking": table}


def select_blocks(features: FeatureSet, fit: Fit) -> tuple[FeatureSet, dict[str, Any]]:
    """Select several spaces, or the last layer where they do not improve on it beyond noise; return features and report.

    The last layer is the penultimate one, or else the last in model order; of several backbones, the one that scores best
    on val. The other spaces are tried in the order of their own log loss on val (forward selection). A space is added
    where the log loss of the joint head becomes lower. This takes two fits per space. `is_beyond_noise` makes the final
    decision.
    """
    candidates = _evaluate_each(features, fit)
    last = max(_last_layers(candidates), key=lambda candidate: candidate.score)
    blocks = last
    for candidate in sorted((one for one in candidates if one is not last), key=lambda one: one.lowest_loss):
        folders = {*(space.folder for space in blocks.features.spaces), candidate.features.space.folder}
        joint = _evaluate(features.only(space for space in features.spaces if space.folder in folders), fit)
        blocks = joint if joint.lowest_loss < blocks.lowest_loss else blocks
    winner = blocks if is_beyond_noise(blocks, last) else last
    return winner.features, _describe_blocks(candidates, winner, last=last, blocks=blocks)


def is_beyond_noise(new: Candidate, old: Candidate) -> bool:
    """Return True if `new` is better on val than `old` by more than noise.

    More predictions must be correct, and one of two tests must hold. (1) McNemar's statistic with continuity correction
    is at least one standard error: gained - lost - 1 >= sqrt(gained + lost), over the samples on which the two disagree.
    (2) The mean difference of the log loss is at least two standard errors. The log loss reacts earlier than accuracy,
    but alone it is no evidence of more correct predictions.

    Source: McNemar, Psychometrika 12 (1947).
    """
    gained, lost = int((new.correct & ~old.correct).sum()), int((old.correct & ~new.correct).sum())
    saved = old.losses - new.losses
    lower_loss = saved.mean() >= 2 * saved.std() / math.sqrt(len(saved))
    return gained > lost and bool(lower_loss or gained - lost - 1 >= math.sqrt(gained + lost))


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


def _describe_blocks(
    candidates: Sequence[Candidate], winner: Candidate, *, last: Candidate, blocks: Candidate
) -> dict[str, Any]:
    chosen = [space.folder for space in winner.features.spaces]
    factors = block_scale_factors(winner.features.widths).tolist() if len(chosen) > 1 else [None]
    scales = dict(zip(chosen, factors, strict=True))
    rows = [
        {**candidate.describe(), "scale": scales.get(folder), "chosen": folder in chosen}
        for candidate, folder in ((one, one.features.space.folder) for one in candidates)
    ]
    gain, interval = paired_difference(blocks.correct, last.correct)
    decision = {
        "chosen": "last" if winner is last else "blocks",
        "last": {"layer": last.features.space.spec["layer"], **last.to_dict()},
        "blocks": {"layers": list(blocks.features.layers), **blocks.to_dict()},
        "gain": gain,
        "gain_ci95": interval,
    }
    return {"blocks": rows, "decision": decision}

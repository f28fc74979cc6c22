"""Verify the advice: run the recommended option and the alternatives, and compare them on the same held-out images.

Held out is test, which is scored here for the first time, or val if there is no test. The advice counts as right if no other
option is better by more than the 95 % interval of the paired difference. Options that need manual work are checked in part:
fix-labels by a head fitted without the suspected labels; fix-leaks by whether copies are predicted correctly more often than
other images; more-data by whether a head on all images is better than one on half of them.

>>> Trials(features, evidence, epochs=10, runs_dir=Path("runs")).verify(decide(evidence))["right"]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embedpipe.classifier import Classifier, read_predictions
from embedpipe.commands.advise._decision import Option
from embedpipe.commands.advise._measurement import Evidence
from embedpipe.commands.compare import Comparison, compare
from embedpipe.commands.finetune import finetune
from embedpipe.commands.fit_head import fit_head
from embedpipe.evaluation import wilson_interval
from embedpipe.features import FeatureSet

if TYPE_CHECKING:
    from embedpipe.data import Sample
    from embedpipe.inference import Progress

FULL_BATCH, LEAST_BATCH, STEPS = 32, 8, 32
SMALL_RATE = (
    2e-4  # for all layers; at 1e-3 the loss on scattered digits rose tenfold, and no epoch was better than the head
)


def training_options(option: Option, n_train: int) -> dict[str, Any]:
    """Return the fine-tuning options: a batch size that gives small data enough steps, a small rate if all layers train."""
    size = {"batch_size": min(FULL_BATCH, max(LEAST_BATCH, n_train // STEPS))}
    return size if option.layers else {**size, "lr": SMALL_RATE}


@dataclass(frozen=True)
class Trials:
    """Trial runs of options on a data set whose layers are cached."""

    features: FeatureSet
    evidence: Evidence
    epochs: int
    runs_dir: Path
    seed: int = 0
    progress: Progress | None = None

    def verify(self, options: Sequence[Option]) -> dict[str, Any]:
        """Run the recommended option, which is the first, and the alternatives.

        Returns
        -------
        dict
            split, n, tried : [{action, layers, run, accuracy, accuracy_ci95, minutes, difference, difference_ci95 (to the
            recommended one)}], right, why
        """
        chosen, last = options[0], self.features.only(self.features.spaces[-1:])
        linear = self._fit(last)
        baseline = Option("linear-head", self.evidence.last.layers, "")
        if chosen.action == "fix-leaks":
            return _compare_copies(linear, set(self.evidence.leaked.paths))
        if chosen.action == "fix-labels":
            cleaned = self._fit(_without(last, set(self.evidence.wrong_labels.paths)))
            return _compare([(chosen, cleaned), (baseline, linear)])
        if chosen.action == "more-data":
            result = _compare([(chosen, linear), (baseline, self._fit(_half(last, self.seed)))])
            is_better = result["tried"][1]["difference_ci95"][1] < 0
            why = f"all of train is {'' if is_better else 'not '}better than half of it by more than the interval"
            return {**result, "right": is_better, "why": why}
        modes = [one for one in options if one.action not in ("fix-leaks", "fix-labels", "more-data")]
        return _compare([(mode, self._run(mode, linear)) for mode in modes])

    @property
    def _settings(self) -> dict[str, Any]:
        cache_dir = self.features.space.folder.parent.parent
        return {"cache_dir": cache_dir, "runs_dir": self.runs_dir, "seed": self.seed}

    def _fit(self, features: FeatureSet) -> Classifier:
        return fit_head(features, **self._settings)

    def _run(self, option: Option, linear: Classifier) -> Classifier:
        if option.action.startswith("finetune"):
            training = training_options(option, self.evidence.n_train) | self._settings
            layers = option.layers or "all"
            return finetune(linear, unfreeze=layers, epochs=self.epochs, progress=self.progress, **training)
        if option.layers == self.evidence.last.layers:
            return linear
        return self._fit(self.features.only(s for s in self.features.spaces if s.spec["layer"] in option.layers))


def _compare(tried: Sequence[tuple[Option, Classifier]]) -> dict[str, Any]:
    """Compare the runs with the first, the recommended one."""
    runs = list({classifier.folder: classifier for _, classifier in tried}.values())
    split = _held_out(runs[0])
    comparison = compare(runs, split=split) if len(runs) > 1 else None
    rows = [_row(option, classifier, comparison) for option, classifier in tried]
    better = [row["action"] for row in rows[1:] if row["difference_ci95"][0] > 0]
    best = max(rows, key=lambda row: row["accuracy"])
    verdict = f"better by more than the interval: {', '.join(better)}" if better else "no other is significantly better"
    why = f"{rows[0]['action']} {rows[0]['accuracy']:.1%}, best {best['action']} {best['accuracy']:.1%}; {verdict}"
    return {"split": split, "n": rows[0]["n"], "tried": rows, "right": not better, "why": why}


def _row(option: Option, classifier: Classifier, comparison: Comparison | None) -> dict[str, Any]:
    scores = classifier.report["metrics"][_held_out(classifier)]
    pairs = comparison.pairs if comparison else ()
    pair = next((pair for pair in pairs if pair.other == classifier.name), None)
    return {
        "action": option.action,
        "layers": list(option.layers),
        "run": classifier.report["run"],
        "n": scores["n"],
        "accuracy": scores["accuracy"],
        "accuracy_ci95": scores["accuracy_ci95"],
        "minutes": classifier.report["seconds"] / 60,
        "difference": pair.difference if pair else 0.0,
        "difference_ci95": pair.difference_ci95 if pair else [0.0, 0.0],
    }


def _held_out(classifier: Classifier) -> Literal["test", "val"]:
    return "test" if "test" in classifier.report["metrics"] else "val"


def _compare_copies(linear: Classifier, leaked: set[str]) -> dict[str, Any]:
    """Score the copies and the other images of the held-out split separately, by the same head."""
    assert linear.folder is not None
    split = _held_out(linear)
    copies: list[bool] = []
    others: list[bool] = []
    for row in read_predictions(linear.folder):
        if row.split == split:
            (copies if row.path in leaked else others).append(row.predicted == row.label)
    tried = [
        {
            "action": action,
            "n": len(correct),
            "accuracy": sum(correct) / len(correct),
            "minutes": linear.report["seconds"] / 60,
            "accuracy_ci95": list(wilson_interval(sum(correct), len(correct))),
        }
        for action, correct in (("fix-leaks", others), ("linear-head", copies + others))
        if correct
    ]
    share, other = (sum(correct) / max(1, len(correct)) for correct in (copies, others))
    why = f"in {split} {share:.1%} of {len(copies)} copies are predicted correctly, {other:.1%} of {len(others)} other images"
    right, n = bool(copies) and share >= other, len(copies) + len(others)
    return {"split": split, "n": n, "tried": tried, "right": right, "why": why}


def _without(features: FeatureSet, paths: set[str]) -> FeatureSet:
    """Return the data set without some images of train and val."""
    name = features.manifest.name_of
    return _select(features, (s for s in features.manifest.samples if s.split == "test" or name(s) not in paths))


def _half(features: FeatureSet, seed: int) -> FeatureSet:
    """Return the data set with half of the train images of each class, drawn at random."""
    rng, drawn = np.random.default_rng(seed), []
    for label in features.classes:
        members = [s for s in features.manifest.samples if s.split == "train" and s.label == label]
        drawn += [members[k] for k in sorted(rng.permutation(len(members))[: max(1, len(members) // 2)].tolist())]
    return _select(features, [*drawn, *(s for s in features.manifest.samples if s.split != "train")])


def _select(features: FeatureSet, samples: Iterable[Sample]) -> FeatureSet:
    return replace(features, manifest=replace(features.manifest, samples=tuple(samples)))

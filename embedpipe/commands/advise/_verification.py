"""Was the advice right? What it advised is run, and so is what it did not, and all are held against the same held-out images.

Held out is test, which is looked at here for the first time, or val where there is no test. The advice counts as right where no
other action is better by more than the 95 % interval of the paired difference. What asks for people's work is tried as far as it
can be: fix-labels by a head fitted without the suspects; fix-leaks by whether the copies are answered rightly more often than the
other images; more-data by whether a head on all images beats one on half of them.

>>> verify(choices, features, evidence, Budget(epochs=10, runs_dir=Path("runs")))["right"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embedpipe.classifier import Classifier, read_predictions
from embedpipe.commands.advise._decision import Choice
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
SMALL_RATE = 2e-4  # where all layers move; at 1e-3 the loss of scattered digits rose tenfold, no epoch beat the head


@dataclass(frozen=True)
class Budget:
    """What each try may cost, and where its run goes."""

    epochs: int
    cache_dir: Path
    runs_dir: Path
    seed: int = 0
    progress: Progress | None = None


def training_options(choice: Choice, n_train: int) -> dict[str, Any]:
    """Return how a choice is fine-tuned: batches that give small data some steps an epoch, a small rate where all moves."""
    size = {"batch_size": min(FULL_BATCH, max(LEAST_BATCH, n_train // STEPS))}
    return size if choice.layers else {**size, "lr": SMALL_RATE}


def verify(choices: Sequence[Choice], features: FeatureSet, evidence: Evidence, budget: Budget) -> dict[str, Any]:
    """Try the advised action, the first one, and those that it was preferred to.

    Returns
    -------
    dict
        split, n, tried : [{action, layers, run, accuracy, accuracy_ci95, minutes, difference, difference_ci95 (to the advised
        one)}], right, why
    """
    advised = choices[0]
    last = features.only(features.spaces[-1:])
    linear = _fit(last, budget)
    if advised.action == "fix-leaks":
        return _verify_leaks(linear, evidence)
    if advised.action == "fix-labels":
        cleaned = _fit(_without(last, set(evidence.wrong_labels.paths)), budget)
        return _report([(advised, cleaned), (_named("linear-head", evidence), linear)])
    if advised.action == "more-data":
        half = _fit(_half(last, budget.seed), budget)
        found = _report([(advised, linear), (_named("linear-head", evidence, "on half of train"), half)])
        better = found["tried"][1]["difference_ci95"][1] < 0
        why = "all of train " + ("beats" if better else "does not beat") + " half of it by more than the interval"
        return {**found, "right": better, "why": why}
    modes = [one for one in choices if one.action not in ("fix-leaks", "fix-labels", "more-data")]
    return _report(
        [
            (one, linear if one.action == "linear-head" else _try(one, features, linear, evidence, budget))
            for one in modes
        ]
    )


def _fit(features: FeatureSet, budget: Budget) -> Classifier:
    return fit_head(features, cache_dir=budget.cache_dir, runs_dir=budget.runs_dir, seed=budget.seed)


def _try(choice: Choice, features: FeatureSet, linear: Classifier, evidence: Evidence, budget: Budget) -> Classifier:
    if choice.action in ("earlier-layer", "several-layers"):
        spaces = [space for space in features.spaces if space.spec["layer"] in choice.layers]
        return linear if spaces == list(features.spaces[-1:]) else _fit(features.only(spaces), budget)
    return finetune(
        linear,
        unfreeze=choice.layers or "all",
        epochs=budget.epochs,
        **training_options(choice, evidence.n_train),
        cache_dir=budget.cache_dir,
        runs_dir=budget.runs_dir,
        seed=budget.seed,
        progress=budget.progress,
    )


def _named(action: str, evidence: Evidence, note: str = "") -> Choice:
    return Choice(action, evidence.last.layers, note)


def _report(tried: Sequence[tuple[Choice, Classifier]]) -> dict[str, Any]:
    """Compare the runs with the first, the advised one."""
    runs = list({one.folder: one for _, one in tried}.values())
    done = compare(runs, split=_held_out(runs[0])) if len(runs) > 1 else None
    rows = [_row(choice, classifier, done) for choice, classifier in tried]
    better = [row for row in rows[1:] if row["difference_ci95"][0] > 0]
    best = max(rows, key=lambda row: row["accuracy"])
    why = f"{rows[0]['action']} {rows[0]['accuracy']:.1%}, best {best['action']} {best['accuracy']:.1%}; " + (
        f"better by more than the interval: {', '.join(row['action'] for row in better)}"
        if better
        else "no other is better by more than the interval"
    )
    return {"split": _held_out(runs[0]), "n": rows[0]["n"], "tried": rows, "right": not better, "why": why}


def _row(choice: Choice, classifier: Classifier, done: Comparison | None) -> dict[str, Any]:
    scores = classifier.report["metrics"][_held_out(classifier)]
    pair = next((one for one in done.pairs if one.other == classifier.name), None) if done else None
    difference, interval = (pair.difference, pair.difference_ci95) if pair else (0.0, [0.0, 0.0])
    return {
        "action": choice.action,
        "layers": list(choice.layers),
        "run": classifier.report["run"],
        "n": scores["n"],
        "accuracy": scores["accuracy"],
        "accuracy_ci95": scores["accuracy_ci95"],
        "minutes": classifier.report["seconds"] / 60,
        "difference": difference,
        "difference_ci95": interval,
    }


def _held_out(classifier: Classifier) -> Literal["test", "val"]:
    return "test" if "test" in classifier.report["metrics"] else "val"


def _verify_leaks(linear: Classifier, evidence: Evidence) -> dict[str, Any]:
    """Score the copies and the other images of the held-out split apart, by the same head."""
    assert linear.folder is not None
    split, leaked = _held_out(linear), set(evidence.leaked.paths)
    rows = [one for one in read_predictions(linear.folder) if one.split == split]
    copies, others = (
        [one.predicted == one.label for one in rows if (one.path in leaked) == is_copy] for is_copy in (True, False)
    )
    tried = [
        {
            "action": action,
            "n": len(right),
            "accuracy": sum(right) / len(right),
            "minutes": linear.report["seconds"] / 60,
            "accuracy_ci95": list(wilson_interval(sum(right), len(right))),
        }
        for action, right in (("fix-leaks", others), ("linear-head", copies + others))
        if right
    ]
    share = [sum(right) / max(1, len(right)) for right in (copies, others)]
    why = f"of {len(copies)} copies in {split} {share[0]:.1%} are answered rightly, of {len(others)} other images {share[1]:.1%}"
    return {"split": split, "n": len(rows), "tried": tried, "right": bool(copies) and share[0] >= share[1], "why": why}


def _without(features: FeatureSet, paths: set[str]) -> FeatureSet:
    """Return the data set without some images of train and val."""
    name = features.manifest.name_of
    return _of(features, [s for s in features.manifest.samples if s.split == "test" or name(s) not in paths])


def _half(features: FeatureSet, seed: int) -> FeatureSet:
    """Return the data set with half of the train images of each class, drawn at random."""
    rng, kept = np.random.default_rng(seed), []
    for label in features.classes:
        mine = [s for s in features.manifest.samples if s.split == "train" and s.label == label]
        kept += [mine[k] for k in sorted(rng.permutation(len(mine))[: max(1, len(mine) // 2)].tolist())]
    return _of(features, [*kept, *(s for s in features.manifest.samples if s.split != "train")])


def _of(features: FeatureSet, samples: Sequence[Sample]) -> FeatureSet:
    return replace(features, manifest=replace(features.manifest, samples=tuple(samples)))

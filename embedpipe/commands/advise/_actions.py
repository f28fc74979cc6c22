"""Carry out options: the commands that a user types, and trial runs that verify the advice.

The recommended option and the alternatives are compared on the same held-out images: those of test, which is scored here for
the first time, or of val if there is no test. The advice counts as right if no other option is better by more than the 95 %
interval of the paired difference. Options that need manual work are checked in part: fix-labels by a head fitted without the
suspected labels; fix-leaks by whether copies are predicted correctly more often than other images; more-data by whether a head
on all images is better than one on half of them.

>>> format_commands(option, features, evidence, epochs=10, runs_dir=Path("runs"))
('embedpipe fit-head pets-0123 --backbone timm:resnet18 --layer penultimate',)
>>> verify_advice(decide(evidence), features, evidence, epochs=10, runs_dir=Path("runs"), seed=0)["right"]
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embedpipe.classifier import Classifier, Reference, read_predictions
from embedpipe.commands.advise._decision import Option
from embedpipe.commands.advise._measurement import Evidence, select_samples
from embedpipe.commands.compare import Pair, compare
from embedpipe.commands.finetune import finetune
from embedpipe.commands.fit_head import fit_head
from embedpipe.evaluation import wilson_interval
from embedpipe.features import FeatureSet, extract_flags, feature_spaces, model_fields

if TYPE_CHECKING:
    from embedpipe.inference import Progress

FULL_BATCH, LEAST_BATCH, STEPS = 32, 8, 32
# The rate for all layers: at 1e-3 the loss on scattered digits rose tenfold, and no epoch was better than the head.
SMALL_RATE = 2e-4


def format_commands(
    option: Option, features: FeatureSet, evidence: Evidence, epochs: int, runs_dir: Path
) -> tuple[str, ...]:
    """Return the command lines that carry out an option."""
    cache_dir = str(features.cache.root)
    cache_flags = [] if cache_dir == "cache" else ["--cache-dir", cache_dir]
    folders = cache_flags + ([] if str(runs_dir) == "runs" else ["--runs-dir", str(runs_dir)])
    data = [features.dataset, *folders]
    last_layer = _space_flags(features, evidence.last.layers)
    if option.action.startswith("fix-") or option.action == "more-data":  # manual work, then the same steps again
        sources = [source.absolute for source in features.manifest.sources]
        flags = extract_flags(features.space.spec, {**features.loader, "layer": None})
        lines = [["extract", *sources, *flags, *cache_flags], ["advise", *data]]
        lines = lines if option.action == "more-data" else [["audit", *data, *last_layer], *lines]
    elif option.action.startswith("finetune"):
        training = {"epochs": epochs, **_training_options(option, evidence.n_train)}
        tune = ["finetune", "--unfreeze", *(option.layers or ("all",)), *_flags(training), *folders]
        lines = [["fit-head", *data, *last_layer], tune]
    else:
        lines = [["fit-head", *data, *_space_flags(features, option.layers)]]
    return tuple(shlex.join(["embedpipe", *line]) for line in lines)


def _space_flags(features: FeatureSet, layers: tuple[str, ...]) -> list[str]:
    """Return --backbone and --layer, or --space where these match other spaces of the cache too."""
    name, model = Reference.of([features.space]).name, model_fields(features.space.spec)
    others = [space for space in feature_spaces(features.cache) if model_fields(space.spec) != model]
    names = [Reference.of([space]).name for space in others]
    if name in names:
        folders = [space.folder.name for space in features.spaces if space.spec["layer"] in layers]
        return [word for folder in folders for word in ("--space", folder)]
    return ["--backbone", name, *(word for layer in layers for word in ("--layer", layer))]


def _flags(options: dict[str, object]) -> list[str]:
    return [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def _training_options(option: Option, n_train: int) -> dict[str, Any]:
    """Return the fine-tuning options: a batch size that gives small data enough steps, a small rate if all layers train."""
    size = {"batch_size": min(FULL_BATCH, max(LEAST_BATCH, n_train // STEPS))}
    return size if option.layers else {**size, "lr": SMALL_RATE}


def verify_advice(
    options: Sequence[Option],
    features: FeatureSet,
    evidence: Evidence,
    *,
    epochs: int,
    runs_dir: Path,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the recommended option, which is the first, and the alternatives on a data set whose layers are cached.

    Returns
    -------
    dict
        split, n, tried : [{action, layers, run, accuracy, accuracy_ci95, minutes, difference, difference_ci95 (to the
        recommended one)}], right, why
    """
    settings: dict[str, Any] = {"cache_dir": features.cache.root, "runs_dir": runs_dir, "seed": seed}

    def fit(features: FeatureSet) -> Classifier:
        return fit_head(features, **settings)

    def run(option: Option) -> Classifier:
        if option.action.startswith("finetune"):
            training = _training_options(option, evidence.n_train) | settings
            return finetune(linear, unfreeze=option.layers or "all", epochs=epochs, progress=progress, **training)
        if option.layers == evidence.last.layers:
            return linear
        return fit(features.only(space for space in features.spaces if space.spec["layer"] in option.layers))

    chosen, last = options[0], features.only(features.spaces[-1:])
    linear, baseline = fit(last), Option("linear-head", evidence.last.layers, "")
    if chosen.action == "fix-leaks":
        return _compare_copies(linear, set(evidence.leaked.paths))
    if chosen.action == "fix-labels":
        return _compare([(chosen, fit(_without(last, set(evidence.wrong_labels.paths)))), (baseline, linear)])
    if chosen.action == "more-data":
        result = _compare([(chosen, linear), (baseline, fit(_half(last, seed)))])
        is_better = result["tried"][1]["difference_ci95"][1] < 0
        why = f"all of train is {'' if is_better else 'not '}better than half of it by more than the interval"
        return {**result, "right": is_better, "why": why}
    return _compare([(option, run(option)) for option in options if option.action != "more-data"])


def _compare(tried: Sequence[tuple[Option, Classifier]]) -> dict[str, Any]:
    """Compare the runs with the first, the recommended one."""
    runs = list({classifier.folder: classifier for _, classifier in tried}.values())
    split = _held_out(runs[0])
    pairs = {pair.other: pair for pair in compare(runs, split=split).pairs} if len(runs) > 1 else {}
    rows = [_row(option, classifier, pairs.get(classifier.name)) for option, classifier in tried]
    better = [row["action"] for row in rows[1:] if row["difference_ci95"][0] > 0]
    best = max(rows, key=lambda row: row["accuracy"])
    verdict = f"better by more than the interval: {', '.join(better)}" if better else "no other is significantly better"
    why = f"{rows[0]['action']} {rows[0]['accuracy']:.1%}, best {best['action']} {best['accuracy']:.1%}; {verdict}"
    return {"split": split, "n": rows[0]["n"], "tried": rows, "right": not better, "why": why}


def _row(option: Option, classifier: Classifier, pair: Pair | None) -> dict[str, Any]:
    scores = classifier.report["metrics"][_held_out(classifier)]
    return {
        "action": option.action,
        "layers": list(option.layers),
        "run": classifier.report["run"],
        **{name: scores[name] for name in ("n", "accuracy", "accuracy_ci95")},
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
    rows = [row for row in read_predictions(linear.folder) if row.split == split]
    copies = [row.predicted == row.label for row in rows if row.path in leaked]
    others = [row.predicted == row.label for row in rows if row.path not in leaked]
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
    return {"split": split, "n": len(rows), "tried": tried, "right": bool(copies) and share >= other, "why": why}


def _without(features: FeatureSet, paths: set[str]) -> FeatureSet:
    """Return the data set without some images of train and val."""
    name = features.manifest.display_name
    return select_samples(features, (s for s in features.manifest.samples if s.split == "test" or name(s) not in paths))


def _half(features: FeatureSet, seed: int) -> FeatureSet:
    """Return the data set with half of the train images of each class, drawn at random."""
    rng, drawn = np.random.default_rng(seed), []
    for label in features.classes:
        members = [s for s in features.manifest.samples if s.split == "train" and s.label == label]
        drawn += [members[k] for k in sorted(rng.permutation(len(members))[: max(1, len(members) // 2)].tolist())]
    return select_samples(features, [*drawn, *(s for s in features.manifest.samples if s.split != "train")])

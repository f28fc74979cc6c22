"""Leaks: images of val and test that are also in an earlier split, as exact copies, near copies or members of one group.

>>> find_leaks(features, scored)["leaked"]
{'val': 0, 'test': 3}
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.errors import warn
from embedpipe.evaluation import MIN_ROWS, copy_ratio, find_neighbours, unit_rows

if TYPE_CHECKING:
    from embedpipe.classifier import Scored
    from embedpipe.data import Sample
    from embedpipe.features import FeatureSet

REPORTED = 20  # pairs and groups in the report
MAX_PRODUCTS = 2e11  # multiply-adds of a search for near copies: a few seconds on one core
REFERENCE_ROWS = 2000  # evenly spaced training rows that give the typical distance
MAIN_METRIC = {"single": "accuracy", "multilabel": "mean_average_precision", "regression": "r2"}  # by task
SPLIT_ORDER = ("train", "val", "test")  # a split may leak into the later ones


@dataclass(frozen=True)
class Leak:
    """An image that has a counterpart in an earlier split.

    kind : str                    "exact", "near" or "group"
    similarity : float or None    cosine of the centred features, where computed
    """

    sample: Sample
    twin: Sample
    kind: str
    similarity: float | None = None


def find_leaks(features: FeatureSet, scored: Mapping[str, Scored], *, max_bytes: float = math.inf) -> dict[str, Any]:
    """Report images of val and test that are in an earlier split, and the scores without them; warn if there are any.

    Parameters
    ----------
    scored : mapping of str to Scored    predictions of each split
    max_bytes : float                    memory limit; larger feature sets are not searched for near copies

    Returns
    -------
    dict
        duplicates_of_train : {split: count}        identical files
        duplicates_of_val : {"test": count}
        near_duplicates_of_train : {split: count}   nearly identical features; null if not searched
        near_ratio, near_skipped                    threshold (`evaluation.copy_ratio`); why there was no search
        groups_across_splits : int; groups : [{group, splits: {name: count}}], the first 20
        leaked : {split: count}                     images with any of these, counted once
        accuracy_without_leaks : {split: {accuracy, accuracy_ci95, n}}; single labels; null if no image is left
        score_without_leaks : {split: {mean_average_precision or r2, its ci95, n}}; several labels or regression
        pairs : [{path, split, kind, twin, similarity}], the first 20
    """
    exact = find_exact(features.samples())
    near, ratio, skipped = find_near(features, max_bytes=max_bytes)
    groups = find_groups(features.samples())
    found = (*exact, *near, *group_leaks(features.samples()))
    leaked = {leak.sample for leak in found}
    others = [split for split in features.splits if split in SPLIT_ORDER[1:]]
    later = {split: predictions for split, predictions in scored.items() if split in SPLIT_ORDER[1:]}
    without = {split: _score_without(predictions, features.classes, leaked) for split, predictions in later.items()}
    single = features.manifest.task == "single"
    report = {
        "duplicates_of_train": _count(exact, "train", others),
        "duplicates_of_val": _count(exact, "val", [split for split in others if split == "test"]),
        "near_duplicates_of_train": None if skipped else _count(near, "train", others),
        "near_ratio": ratio,
        "near_skipped": skipped,
        "groups_across_splits": len(groups),
        "groups": [{"group": name, "splits": dict(counts)} for name, counts in list(groups.items())[:REPORTED]],
        "leaked": {split: sum(sample.split == split for sample in leaked) for split in others},
        "accuracy_without_leaks": without if single else {},
        "score_without_leaks": {} if single else without,
        "pairs": [_pair(features, leak) for leak in found[:REPORTED]],
    }
    _warn(report)
    return report


def find_exact(samples: Sequence[Sample]) -> tuple[Leak, ...]:
    """Return the images of val and test whose file content is in an earlier split; train takes precedence over val."""
    ordered = _in_split_order(samples)
    first = _first_by(ordered, "key")
    return tuple(Leak(s, first[s.key], "exact", 1.0) for s in ordered if s.split != first[s.key].split)


def _in_split_order(samples: Sequence[Sample]) -> list[Sample]:
    """Return the images of train, val and test in the order of the splits."""
    return [sample for split in SPLIT_ORDER for sample in samples if sample.split == split]


def _first_by(samples: Sequence[Sample], field: str) -> dict[Any, Sample]:
    """Return the first sample with each value of a field."""
    return {getattr(sample, field): sample for sample in reversed(samples)}


def find_near(features: FeatureSet, *, max_bytes: float = math.inf) -> tuple[list[Leak], float | None, str | None]:
    """Return the images of val and test whose features nearly equal those of a training image with other file content.

    The similarity is the cosine of the features, centred by the mean of train.

    Returns
    -------
    leaks; the threshold that was used (`evaluation.copy_ratio`), or None; and why there was no search, or None
    """
    train = features.samples("train")
    known = {sample.key for sample in train}
    others = tuple(s for s in features.samples() if s.split in SPLIT_ORDER[1:] and s.key not in known)
    skipped = _reason_to_skip(len(train), len(others), features.feature_dim)
    if not features.fits(max_bytes):
        skipped = "the features exceed --max-memory"
    if skipped or not others:
        return [], None, skipped
    X = features.read(train)
    mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
    base = unit_rows(X - mean)
    own = np.unique(np.linspace(0, len(base) - 1, REFERENCE_ROWS).astype(np.int64))
    ratio = copy_ratio(find_neighbours(base[own], base, own=own), len(others))
    found = find_neighbours(unit_rows(features.read(others) - mean), base)
    rows = np.flatnonzero(found.copies(ratio))
    rows = rows[np.argsort(found.first[rows], kind="stable")]
    similarity = found.similarity
    leaks = [Leak(others[i], train[found.nearest[i]], "near", float(similarity[i])) for i in rows]
    return leaks, ratio, None


def _reason_to_skip(n_train: int, n_others: int, dim: int) -> str | None:
    if n_train < MIN_ROWS:
        return f"{n_train} training images, at least {MIN_ROWS} are needed to estimate how similar different images are"
    if n_train * n_others * dim > MAX_PRODUCTS:
        return f"{n_train} x {n_others} images of {dim} features, expected at most {MAX_PRODUCTS:.0e} products"
    return None


def find_groups(samples: Sequence[Sample]) -> dict[str, Counter[str]]:
    """Return the groups that are in several splits, sorted by name, with their image count in each split."""
    splits: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        if sample.group:
            splits[sample.group][sample.split] += 1
    return {name: counts for name, counts in sorted(splits.items()) if len(counts) > 1}


def group_leaks(samples: Sequence[Sample]) -> list[Leak]:
    """Return the images whose group is also in an earlier split."""
    first = _first_by(_in_split_order(samples), "group")
    twins = [(sample, first[sample.group]) for sample in samples if sample.group and sample.group in first]
    return [Leak(sample, twin, "group") for sample, twin in twins if sample.split != twin.split]


def _count(leaks: Sequence[Leak], twin_split: str, splits: Sequence[str]) -> dict[str, int]:
    counts = Counter(leak.sample.split for leak in leaks if leak.twin.split == twin_split)
    return {split: counts[split] for split in splits}


def _score_without(scored: Scored, classes: Sequence[str], leaked: set[Sample]) -> dict[str, Any]:
    """Return the main metric of the samples that are not leaked, with its interval."""
    kept = [row for row, sample in enumerate(scored.samples) if sample not in leaked]
    samples = tuple(scored.samples[row] for row in kept)
    rest = replace(scored, samples=samples, probabilities=scored.probabilities[kept])
    metrics, name = rest.metrics(classes) if kept else {}, MAIN_METRIC[scored.task]
    return {name: metrics.get(name), f"{name}_ci95": metrics.get(f"{name}_ci95"), "n": len(kept)}


def _pair(features: FeatureSet, leak: Leak) -> dict[str, Any]:
    name = features.manifest.display_name
    where = {"path": name(leak.sample), "split": leak.sample.split, "kind": leak.kind}
    return {**where, "twin": name(leak.twin), "twin_split": leak.twin.split, "similarity": leak.similarity}


def _warn(report: Mapping[str, Any]) -> None:
    """Warn in one line about the leaked images of each split and its score without them."""
    parts = []
    for split, count in report["leaked"].items():
        found = (report["accuracy_without_leaks"] | report["score_without_leaks"]).get(split, {})
        name, value = next(iter(found.items()), ("", None))
        without = "" if value is None else f" ({name.replace('_', ' ')} without them {value:.4f})"
        parts += [f"{count} of {split}{without}"] if count else []
    if parts:
        warn(f"images that are also in an earlier split, as copies, near copies or by group: {', '.join(parts)}")

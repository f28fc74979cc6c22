"""Splits: the hash split, which depends on the content or group of a sample, and not on a seed or on other samples.

Each sample has a position u = sha256("split0" + (group or key in hex)) / 2^256 in [0, 1). With fractions t of test and v of
val: u < t is test, t <= u < t + v is val, and the rest is train. Samples that share their content or group are one connected
component, which moves as a whole; its position is the smallest of its samples. New images therefore never move old ones,
and copies are never on both sides.

>>> position("patient-7")  # train: above 0.15 + 0.15
0.996956717569708
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from embedpipe.data._labels import label_names
from embedpipe.data._manifest import Sample


def assign_splits(
    samples: Sequence[Sample], *, val_fraction: float, test_fraction: float, task: str = "single"
) -> tuple[list[Sample], list[str]]:
    """Return the samples, each with a split, and warnings.

    Named splits are kept. If train is named and val is not, val is taken from train by the hash split. A test split is never
    added to named splits. Unlabelled samples without a split are "all".
    """
    named = {sample.split for sample in samples}
    if all(sample.label is None for sample in samples):
        return [replace(sample, split=sample.split or "all") for sample in samples], []
    if named != {""} and ("train" not in named or "val" in named):
        return list(samples), []
    source, test_fraction = ("", test_fraction) if named == {""} else ("train", 0.0)
    undivided = [sample for sample in samples if sample.split == source]
    divided, warnings = _hash_split(undivided, val_fraction, test_fraction, task)
    in_order = iter(divided)
    return [next(in_order) if sample.split == source else sample for sample in samples], warnings


def _hash_split(
    samples: Sequence[Sample], val_fraction: float, test_fraction: float, task: str
) -> tuple[list[Sample], list[str]]:
    """Return the samples with splits by position, and warnings.

    Each class is then given a train and a val component (except for regression, and val only if its fraction is not 0): the
    one nearest in position is moved. A class with one component is in train alone.
    """
    val_end = test_fraction + val_fraction
    bounds = {"test": (0.0, test_fraction), "val": (test_fraction, val_end), "train": (val_end, 1.0)}
    names = connected_components(samples)
    split_of = {name: next(split for split, (_, end) in bounds.items() if position(name) < end) for name in set(names)}
    components_of: dict[str, set[str]] = defaultdict(set)  # by class
    for name, sample in zip(names, samples, strict=True):
        for label in label_names(sample.label, task) if sample.label is not None else ():
            components_of[label].add(name)
    warnings = _cover_classes(split_of, components_of, bounds)
    return [replace(sample, split=split_of[name]) for name, sample in zip(names, samples, strict=True)], warnings


def position(identity: str) -> float:
    """Return u in [0, 1) of a group, or of a key in hex."""
    digest = hashlib.sha256(f"split0{identity}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def connected_components(samples: Sequence[Sample]) -> list[str]:
    """Return the name of each sample's connected component: the identity (group or key) in it with the smallest u."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    identities = [sample.group or sample.key.hex() for sample in samples]
    first_with: dict[bytes, str] = {}
    for identity, sample in zip(identities, samples, strict=True):
        parent.setdefault(identity, identity)
        left, right = root(identity), root(first_with.setdefault(sample.key, identity))
        if left != right:
            left, right = sorted((left, right), key=position)
            parent[right] = left
    return [root(identity) for identity in identities]


def _cover_classes(
    split_of: dict[str, str], components_of: Mapping[str, Set[str]], bounds: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Move components in `split_of` so that each class has one in train and in val; return warnings."""
    single = sorted(label for label, names in components_of.items() if len(names) == 1)
    split_of.update({name: "train" for label in single for name in components_of[label]})
    warnings = _summary(single, "with one image or group, put into train and no other split")
    labels_of: dict[str, list[str]] = defaultdict(list)
    for label, names in components_of.items():
        for name in names:
            labels_of[name].append(label)

    def is_last_in_train(name: str) -> bool:
        others = (components_of[label] - {name} for label in labels_of[name])
        return not all(any(split_of[other] == "train" for other in names) for names in others)

    for split in ("train", "val"):
        low, high = bounds[split]
        moved = []
        for label in sorted(components_of) if low < high else ():
            if any(split_of[name] == split for name in components_of[label]):
                continue
            spare = [name for name in components_of[label] if split_of[name] != "train" or not is_last_in_train(name)]
            if spare:
                nearest = min((max(low - position(name), position(name) - high), name) for name in spare)
                split_of[nearest[1]] = split
                moved.append(label)
        warnings += _summary(moved, f"without a {split} image, given the nearest of another split")
    return warnings


def _summary(labels: Sequence[str], what: str) -> list[str]:
    """Return one warning for all labels, or none."""
    shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    return [f"{len(labels)} class(es) {what}: {shown}"] if labels else []

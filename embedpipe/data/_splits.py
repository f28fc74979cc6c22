"""The stable split: a sample's place depends on its group or content, not on neighbours or a seed.

Each sample has a position u = sha256("split0" + (group or key in hex)) in [0, 1). u below the test
fraction is test, the next val fraction is val, the rest train. Samples that share content or group
form a component, which moves as one; its u is the smallest of theirs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from embedpipe.data._manifest import Sample
from embedpipe.data._targets import names_of


def assign_splits(
    samples: Sequence[Sample], *, val_fraction: float, test_fraction: float, task: str = "single"
) -> tuple[list[Sample], list[str]]:
    """Give a split to every sample and say what was out of the ordinary; named splits stand.

    Unlabelled samples are "all". Where train is named and val is not, val is carved from train;
    no test is invented beside a named split.
    """
    named = {sample.split for sample in samples}
    if all(sample.label is None for sample in samples):
        return [replace(sample, split=sample.split or "all") for sample in samples], []
    if named == {""}:
        return hash_split(samples, val_fraction=val_fraction, test_fraction=test_fraction, task=task)
    if "train" not in named or "val" in named:
        return list(samples), []
    train = [sample for sample in samples if sample.split == "train"]
    carved, warnings = hash_split(train, val_fraction=val_fraction, test_fraction=0.0, task=task)
    in_order = iter(carved)
    return [next(in_order) if s.split == "train" else s for s in samples], warnings


def hash_split(
    samples: Sequence[Sample], *, val_fraction: float, test_fraction: float, task: str = "single"
) -> tuple[list[Sample], list[str]]:
    """Split by u; every class is given train and val, one with a lone component only train. Numbers have no classes."""
    val_end = test_fraction + val_fraction
    bounds = {"test": (0.0, test_fraction), "val": (test_fraction, val_end), "train": (val_end, 1)}
    members = components(samples)
    split_of = {
        name: next(split for split, (_, end) in bounds.items() if position(name) < end) for name in set(members)
    }
    parts: dict[str, set[str]] = defaultdict(set)
    for name, sample in zip(members, samples, strict=True):
        for label in names_of(sample.label, task) if sample.label is not None else ():
            parts[label].add(name)
    warnings = _cover_classes(split_of, parts, bounds)
    moved = zip(members, samples, strict=True)
    return [replace(sample, split=split_of[name]) for name, sample in moved], warnings


def position(identity: str) -> float:
    """Return u in [0, 1) of a group or of a key in hex."""
    digest = hashlib.sha256(f"split0{identity}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def components(samples: Sequence[Sample]) -> list[str]:
    """Name each sample's component: the identity with the smallest u of all that it ties by group or content."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    identities = [sample.group or sample.key.hex() for sample in samples]
    first_with: dict[bytes, str] = {}
    for identity, sample in zip(identities, samples, strict=True):
        parent.setdefault(identity, identity)
        one, other = root(identity), root(first_with.setdefault(sample.key, identity))
        if one != other:
            one, other = sorted((one, other), key=position)
            parent[other] = one
    return [root(identity) for identity in identities]


def _cover_classes(
    split_of: dict[str, str], parts: dict[str, set[str]], bounds: dict[str, tuple[float, float]]
) -> list[str]:
    """Move components in `split_of` until each class (its components in `parts`) is covered."""
    lone = sorted(label for label, names in parts.items() if len(names) == 1)
    split_of.update({name: "train" for label in lone for name in parts[label]})
    warnings = _summary(lone, "with one image or group, put into train and no other split")
    classes_of: dict[str, list[str]] = defaultdict(list)
    for label, names in parts.items():
        for name in names:
            classes_of[name].append(label)

    def last_in_train(name: str) -> bool:
        others = (parts[label] - {name} for label in classes_of[name])
        return not all(any(split_of[other] == "train" for other in names) for names in others)

    for need in ("train", "val"):
        low, high = bounds[need]
        moved = []
        for label in sorted(parts) if low < high else ():
            if any(split_of[name] == need for name in parts[label]):
                continue
            spare = [n for n in parts[label] if split_of[n] != "train" or not last_in_train(n)]
            if spare:
                nearest = {n: (max(low - position(n), position(n) - high), n) for n in spare}
                split_of[min(spare, key=nearest.__getitem__)] = need
                moved.append(label)
        warnings += _summary(moved, f"without a {need} image, given the nearest of another split")
    return warnings


def _summary(labels: list[str], what: str) -> list[str]:
    if not labels:
        return []
    shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    return [f"{len(labels)} class(es) {what}: {shown}"]

"""Learning curves: heads fitted on a few training images per class, or on a share of them, and scored on val and test.

>>> learning_curve(config, parse_shots("1,5,10%"), train, {"val": val, "test": test}, repeats=5, seed=0)[0]["metrics"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.errors import UsageError, warn
from embedpipe.heads import Features, Int64, select_rows

if TYPE_CHECKING:
    from embedpipe.selection._head_configuration import HeadConfig

Shots = int | float  # images per class, or a share of them
Labelled = tuple[Features, Int64]  # X float32 (N, D), y int64 (N,)


def parse_shots(shots: str | int | Sequence[str | int]) -> dict[str | int, Shots]:
    """Parse the points of a learning curve: 5 (images per class) stays a number, "10%" becomes the share 0.1.

    Raises
    ------
    UsageError    neither a count of at least 1 nor a percentage in (0, 100]
    """
    texts = [shots] if isinstance(shots, str | int) else shots
    parts = [part.strip() for text in texts for part in str(text).split(",")]
    return dict(_parse(part) for part in parts)


def _parse(text: str) -> tuple[str | int, Shots]:
    share = text.endswith("%")
    try:
        value: Shots = float(text[:-1]) / 100 if share else int(text)
    except ValueError:
        value = 0
    if not (0 < value <= 1 if share else value >= 1):
        hint = "for example --shots 1,5,10,50%"
        raise UsageError(f"--shots {text!r}, expected numbers of images per class, or percentages", hint=hint)
    return text if share else int(value), value


def learning_curve(
    config: HeadConfig,
    shots: Mapping[str | int, Shots],
    train: Labelled,
    others: Mapping[str, Labelled],
    *,
    repeats: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Fit heads on random subsets of train and report their mean accuracy.

    Each repeat shuffles the training images of each class once, and its subsets are prefixes of that order: the images of
    1 shot are among those of 5, and the subset for 5 does not depend on the other points. l2 is selected on the whole
    val split; test is only reported. A point that uses all of train is fitted once.

    Parameters
    ----------
    shots : mapping          as returned by `parse_shots`
    train : X (N, D), y (N,)
    others : mapping of split to X, y
    repeats : int            subsets of each size

    Returns
    -------
    list of dict
        shots, n_train, repeats, l2 (of each repeat), short (classes with fewer images; they use all of them),
        metrics : {split: {accuracy (mean), accuracy_ci95 (t interval over the repeats; null for a single repeat)}}

    Raises
    ------
    UsageError    repeats below 1
    """
    if repeats < 1:
        raise UsageError(f"--repeats {repeats}, expected 1 or more")
    X, y = train
    counts = np.bincount(y, minlength=len(config.classes))
    ranks = [rank_in_class(y, np.random.default_rng((seed % 2**64, repeat))) for repeat in range(repeats)]
    val = others.get("val", (X[:0], y[:0]))
    curve: list[dict[str, Any]] = []
    for name, amount in shots.items():
        sizes = class_sizes(counts, amount)
        subsets = [np.flatnonzero(rank < sizes[y]) for rank in ranks[: 1 if (sizes == counts).all() else None]]
        heads = [config.select(select_rows(X, subset), y[subset], *val) for subset in subsets]
        accuracy = {split: [_accuracy(one.head, *pair) for one in heads] for split, pair in others.items()}
        short = [c for c, count in zip(config.classes, counts.tolist(), strict=True) if count < amount]
        point = {"shots": name, "n_train": len(subsets[0]), "repeats": len(subsets), "l2": [one.l2 for one in heads]}
        metrics = {split: mean_with_interval(values) for split, values in accuracy.items()}
        curve.append({**point, "short": short if isinstance(amount, int) else [], "metrics": metrics})
    short = [f"{len(point['short'])} class(es) have fewer than {point['shots']}" for point in curve if point["short"]]
    if short:
        warn(f"--shots: {', '.join(short)} training images and use all of them")
    return curve


def rank_in_class(y: Int64, rng: np.random.Generator) -> Int64:
    """Return the rank of each row in a random order of its class, int64 (N,), starting at 0."""
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    counts = np.bincount(y)
    rank = np.empty(len(y), np.int64)
    rank[order] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def class_sizes(counts: Int64, amount: Shots) -> Int64:
    """Return the number of images to use of each class, int64 (C,): the same number, or the same share and at least 1."""
    if isinstance(amount, int):
        return np.minimum(counts, amount)
    return np.asarray(np.minimum(counts, np.maximum(1, np.rint(amount * counts).astype(np.int64))))


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of accuracies and its 95 % t interval, clipped to [0, 1]; no interval for a single value."""
    from scipy.special import stdtrit

    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"accuracy": mean, "accuracy_ci95": None}
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
    return {"accuracy": mean, "accuracy_ci95": [max(0.0, mean - half), min(1.0, mean + half)]}


def _accuracy(head: Any, X: Features, y: Int64) -> float:
    return float(np.mean(head.predict_proba(X).argmax(axis=1) == y))

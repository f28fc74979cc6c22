"""compare: paired comparison of runs on the same samples.

Two accuracies may differ significantly although their intervals overlap: the runs predict the same images, and the images on
which they disagree decide which run is better.

>>> compare(["fit-head-run", "finetune-run"]).pairs[0].p_value
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.classifier import Classifier, Predicted

SampleId = tuple[str, str, int]  # content key or path, label, and number among equal ones
Outcomes = tuple["np.ndarray", "np.ndarray | None"]
MIN_CKA_IMAGES = 3  # the CKA of two images is always 1


@dataclass(frozen=True)
class Compared:
    """One run on the common samples.

    accuracy, accuracy_ci95    with its 95 % Wilson interval
    log_loss, log_loss_ci95    None if predictions.csv has no probabilities of the labels
    n_split                    samples of the split in this run; `Comparison.n` counts the common ones
    """

    run: str
    accuracy: float
    accuracy_ci95: list[float]
    log_loss: float | None
    log_loss_ci95: list[float] | None
    n_split: int


@dataclass(frozen=True)
class Pair:
    """Comparison of another run with the first one.

    difference, difference_ci95                      accuracy of `other` minus accuracy of `run`, with its 95 % interval
    b, c                                             samples that only `run`, or only `other`, predicts correctly
    p_value                                          exact McNemar test: two-sided binomial test of b out of b + c
    log_loss_difference, log_loss_difference_ci95    `other` minus `run`: negative if `other` is better
    cka    similarity of their features of these images, from 0 to 1; None if the cache lacks features of one run
    """

    run: str
    other: str
    difference: float
    difference_ci95: list[float]
    b: int
    c: int
    p_value: float
    log_loss_difference: float | None
    log_loss_difference_ci95: list[float] | None
    cka: float | None


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs on n common samples of a split, matched by "content" or by "path".

    chosen_on : names of the runs whose head was selected on this split
    """

    split: str
    n: int
    matched_by: str
    runs: tuple[Compared, ...]
    pairs: tuple[Pair, ...]
    chosen_on: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunToCompare:
    """A run to compare: name, classes, the split it was selected on, predictions, and the spec of its features."""

    name: str
    classes: tuple[str, ...]
    chosen_on: str | None
    predictions: tuple[Predicted, ...]
    spec: Mapping[str, Any] | None = None

    def of(self, split: str, by: str) -> dict[SampleId, Predicted]:
        """Return the predictions of a split by sample id."""
        seen: Counter[tuple[str, str]] = Counter()
        found = {}
        for one in self.predictions:
            if one.split == split:
                name = (one.key if by == "content" else one.path, one.label)
                found[(*name, seen[name])] = one
                seen[name] += 1
        return found


def compare(
    runs: Sequence[Classifier | PathLike],
    *,
    split: Literal["auto", "train", "val", "test"] = "auto",
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
) -> Comparison:
    """Compare runs on the samples that all of them predicted.

    If the cache holds the features of both runs, their similarity (CKA) is reported too: after
    `extract --backbone RUN/model` it shows how far fine-tuning has changed the features.

    Parameters
    ----------
    runs : ids, prefixes or folders of two runs or more
        The others are compared with the first one.
    split : str
        Split to compare on; auto means test, or val if a run has no test split.

    Raises
    ------
    UsageError       fewer than two runs, different classes, or no common sample
    ModelMismatch    a run without readable predictions.csv
    """
    if len(runs) < 2:
        raise UsageError(f"got {len(runs)} run, expected at least 2", hint="see `embedpipe compare --help`")
    read = [_read(run, Path(runs_dir)) for run in runs]
    first = read[0]
    _check_classes(first, read[1:])
    chosen = _split_of(read) if split == "auto" else split
    by = "content" if all(one.key for run in read for one in run.predictions) else "path"
    tables = [run.of(chosen, by) for run in read]
    common = [sample for sample in tables[0] if all(sample in table for table in tables)]
    if not common:
        counts = " and ".join(f"{run.name} {len(table)}" for run, table in zip(read, tables, strict=True))
        raise UsageError(
            f"the runs have no common sample in {chosen}, by {by} and label: {counts}",
            hint="compare runs that were fitted on the same data set, or name another --split",
        )
    most = max(len(table) for table in tables)
    if len(common) < most:
        warnings.warn(f"{len(common)} of {most} images of {chosen} are in all runs", EmbedpipeWarning, stacklevel=2)
    outcomes = [_outcomes(table, common) for table in tables]
    compared = [_compared(run, len(table), *one) for run, table, one in zip(read, tables, outcomes, strict=True)]
    keys = list(dict.fromkeys(name for name, _, _ in common)) if by == "content" else []
    pairs = [
        _pair((first.name, run.name), outcomes[0], one, cka=_cka(first, run, keys, Path(cache_dir)))
        for run, one in zip(read[1:], outcomes[1:], strict=True)
    ]
    tuned = tuple(run.name for run in read if run.chosen_on == chosen)
    return Comparison(chosen, len(common), by, tuple(compared), tuple(pairs), tuned)


def _read(run: Classifier | PathLike, runs_dir: Path) -> RunToCompare:
    from embedpipe.classifier import read_predictions
    from embedpipe.runs import find_run, read_run

    folder = find_run(runs_dir, run) if isinstance(run, str | os.PathLike) else run.folder
    if folder is None:
        raise UsageError("got a classifier without a run folder, expected one returned by fit_head or finetune")
    record = read_run(folder)
    report = record.get("report")
    if not isinstance(report, Mapping) or not isinstance(report.get("classes"), list):
        raise UsageError(f"{folder.name} is a run of {record['verb']}", hint="name runs of fit-head or finetune")
    if report.get("task", "single") != "single":
        raise UsageError(
            f"{folder.name} is a run of {report['task']} targets, expected single labels",
            hint="compare the metrics and intervals in their run.json",
        )
    reference = record.get("reference") or {}
    spec = None if reference.get("beside") else reference.get("spec")
    return RunToCompare(
        folder.name, tuple(report["classes"]), report.get("chosen_on"), tuple(read_predictions(folder)), spec
    )


def _cka(first: RunToCompare, other: RunToCompare, keys: Sequence[str], cache_dir: Path) -> float | None:
    """Return the CKA of the features of two runs on the images (hexadecimal keys) whose features the cache has for both."""
    from embedpipe.cache import Cache
    from embedpipe.evaluation import linear_cka

    if first.spec is None or other.spec is None:
        return None
    cache = Cache(cache_dir)
    views = [cache.open_space(spec).view() for spec in (first.spec, other.spec)]
    both = [key for key in map(bytes.fromhex, keys) if all(key in view for view in views)]
    if len(both) < MIN_CKA_IMAGES:
        return None
    found = linear_cka(*(view.read(both) for view in views))
    return found if found == found else None


def _check_classes(first: RunToCompare, others: Sequence[RunToCompare]) -> None:
    for other in others:
        unmatched = sorted(set(other.classes) ^ set(first.classes))
        if unmatched:
            raise UsageError(
                f"only one of {first.name} and {other.name} has the class {unmatched[0]!r}, expected the same classes",
                hint="compare runs that were fitted on the same classes",
            )


def _split_of(runs: Sequence[RunToCompare]) -> str:
    """Return "test", or "val" with a warning if a run has no test split."""
    found = {run.name: {one.split for one in run.predictions} for run in runs}
    without_test = [name for name, splits in found.items() if "test" not in splits]
    if not without_test:
        return "test"
    warnings.warn(f"{without_test[0]} has no test split; the runs are compared on val", EmbedpipeWarning, stacklevel=3)
    return "val"


def _outcomes(table: Mapping[SampleId, Predicted], common: Sequence[SampleId]) -> Outcomes:
    """Return whether each common sample is predicted correctly, bool (n,), and the losses, float64 (n,), if the run has them."""
    import numpy as np

    from embedpipe.evaluation import MIN_PROBABILITY

    found = [table[sample] for sample in common]
    right = np.array([one.predicted == one.label for one in found])
    true = [one.probability_of_label for one in found if one.probability_of_label is not None]
    return right, -np.log(np.clip(true, MIN_PROBABILITY, 1.0)) if len(true) == len(found) else None


def _compared(run: RunToCompare, n_split: int, right: np.ndarray, losses: np.ndarray | None) -> Compared:
    from embedpipe.evaluation import mean_interval, wilson_interval

    correct, n = int(right.sum()), len(right)
    loss, interval = (None, None) if losses is None else (float(losses.mean()), mean_interval(losses))
    return Compared(run.name, correct / n, list(wilson_interval(correct, n)), loss, interval, n_split)


def _pair(names: tuple[str, str], first: Outcomes, other: Outcomes, *, cka: float | None) -> Pair:
    from embedpipe.evaluation import mcnemar, mean_interval, paired_interval

    (right, losses), (other_right, other_losses) = first, other
    b, c, n = int((right & ~other_right).sum()), int((other_right & ~right).sum()), len(right)
    gaps = None if losses is None or other_losses is None else other_losses - losses
    loss, interval = (None, None) if gaps is None else (float(gaps.mean()), mean_interval(gaps))
    return Pair(*names, (c - b) / n, list(paired_interval(b, c, n)), b, c, mcnemar(b, c), loss, interval, cka)

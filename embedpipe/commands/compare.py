"""compare: runs on the same samples, pair by pair.

Two accuracies with intervals that overlap may still differ: the runs have seen the same images, and only those on which
they disagree say which one is better.

>>> compare(["fit-head-run", "finetune-run"]).pairs[0].p_value
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.classifier import Classifier, Predicted

Sample = tuple[str, str, int]  # content key or path, label, and which one of several that are alike
Answers = tuple["np.ndarray", "np.ndarray | None"]
LEAST_ALIKE = 3  # images; of two, all features agree


@dataclass(frozen=True)
class Compared:
    """One run on the common samples.

    accuracy, accuracy_ci95    with its 95 % Wilson interval
    log_loss, log_loss_ci95    None where predictions.csv has no probabilities of the labels
    n_split                    samples of the split that the run was scored on; `Comparison.n` are in common
    """

    run: str
    accuracy: float
    accuracy_ci95: list[float]
    log_loss: float | None
    log_loss_ci95: list[float] | None
    n_split: int


@dataclass(frozen=True)
class Pair:
    """Another run against the first.

    difference, difference_ci95                      accuracy of `other` minus accuracy of `run`, with its 95 % interval
    b, c                                             samples that only `run`, and only `other`, has right
    p_value                                          exact McNemar test: two-sided binomial of b in b + c
    log_loss_difference, log_loss_difference_ci95    `other` minus `run`: below 0, `other` is better
    cka    how alike their features of these images are, from 0 to 1; None where the cache lacks those of one of them
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
    cka: float | None = None


@dataclass(frozen=True)
class Comparison:
    """n common samples of a split, matched by "content" or by "path"; every run, and every other run against the first.

    chosen_on : names of the runs for which this split helped to choose the head
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
class Run:
    """A run as it is compared: its name, classes, the split that chose it, its predictions, and the spec of its features."""

    name: str
    classes: tuple[str, ...]
    chosen_on: str | None
    predictions: tuple[Predicted, ...]
    spec: Mapping[str, Any] | None = None

    def of(self, split: str, by: str) -> dict[Sample, Predicted]:
        """Return the predictions of a split by sample."""
        alike: Counter[tuple[str, str]] = Counter()
        found = {}
        for one in self.predictions:
            if one.split == split:
                name = (one.key if by == "content" else one.path, one.label)
                found[(*name, alike[name])] = one
                alike[name] += 1
        return found


def compare(
    runs: Sequence[Classifier | PathLike],
    *,
    split: Literal["auto", "train", "val", "test"] = "auto",
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
) -> Comparison:
    """Compare runs on the samples that all of them were scored on: which one is better, and is that more than chance.

    Where the cache holds the features of both, it also says how alike these are: after `extract --backbone RUN/model`, how far
    fine-tuning has moved them.

    Parameters
    ----------
    runs : ids, prefixes or folders of two runs or more
        The first is what the others are compared with.
    split : str
        Which split to compare on; auto is test, or val where a run has no test.

    Raises
    ------
    UsageError       fewer than two runs, other classes, or no sample in common
    ModelMismatch    a run without readable predictions.csv
    """
    if len(runs) < 2:
        raise UsageError(f"found {len(runs)} run, expected at least 2", hint="see `embedpipe compare --help`")
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
            f"no sample of {chosen} in common by {by} and label: {counts}",
            hint="compare runs that were fitted on the same data set, or name another --split",
        )
    most = max(len(table) for table in tables)
    if len(common) < most:
        warnings.warn(f"{len(common)} of {most} images of {chosen} are in all runs", EmbedpipeWarning, stacklevel=2)
    answers = [_answers(table, common) for table in tables]
    compared = [_compared(run, len(table), *one) for run, table, one in zip(read, tables, answers, strict=True)]
    keys = list(dict.fromkeys(name for name, _, _ in common)) if by == "content" else []
    pairs = [
        replace(_pair((first.name, run.name), answers[0], one), cka=_cka(first, run, keys, Path(cache_dir)))
        for run, one in zip(read[1:], answers[1:], strict=True)
    ]
    tuned = tuple(run.name for run in read if run.chosen_on == chosen)
    return Comparison(chosen, len(common), by, tuple(compared), tuple(pairs), tuned)


def _read(run: Classifier | PathLike, runs_dir: Path) -> Run:
    from embedpipe.classifier import read_predictions
    from embedpipe.runs import find_run, read_run

    folder = find_run(runs_dir, run) if isinstance(run, str | os.PathLike) else run.folder
    if folder is None:
        raise UsageError("found a classifier without a run folder, expected what fit_head or finetune returned")
    record = read_run(folder)
    report = record.get("report")
    if not isinstance(report, Mapping) or not isinstance(report.get("classes"), list):
        raise UsageError(f"{folder.name} is a run of {record['verb']}", hint="name runs of fit-head or finetune")
    if report.get("task", "single") != "single":
        raise UsageError(
            f"{folder.name} is a run of {report['task']} targets, expected single labels",
            hint="read the scores of each in its metrics.json: the intervals say what is more than chance",
        )
    reference = record.get("reference") or {}
    spec = None if reference.get("beside") else reference.get("spec")
    return Run(folder.name, tuple(report["classes"]), report.get("chosen_on"), tuple(read_predictions(folder)), spec)


def _cka(first: Run, other: Run, keys: Sequence[str], cache_dir: Path) -> float | None:
    """Return how alike the features of two runs are on the images (hexadecimal keys) of which the cache has both."""
    from embedpipe.cache import Cache
    from embedpipe.evaluation import linear_cka
    from embedpipe.inference import space_name

    if first.spec is None or other.spec is None:
        return None
    cache = Cache(cache_dir)
    views = [cache.open_space(spec, name=space_name(spec)).view() for spec in (first.spec, other.spec)]
    both = [key for key in map(bytes.fromhex, keys) if all(key in view for view in views)]
    if len(both) < LEAST_ALIKE:
        return None
    found = linear_cka(*(view.read(both) for view in views))
    return found if found == found else None


def _check_classes(first: Run, others: Sequence[Run]) -> None:
    for other in others:
        strange = sorted(set(other.classes) ^ set(first.classes))
        if strange:
            raise UsageError(
                f"only one of {first.name} and {other.name} has the class {strange[0]!r}, expected the same classes",
                hint="compare runs that were fitted on the same classes",
            )


def _split_of(runs: Sequence[Run]) -> str:
    """Return test, or val, with a word about it, where a run has no test."""
    found = {run.name: {one.split for one in run.predictions} for run in runs}
    lacking = [name for name, splits in found.items() if "test" not in splits]
    if not lacking:
        return "test"
    warnings.warn(f"{lacking[0]} has no test split: compared on val", EmbedpipeWarning, stacklevel=3)
    return "val"


def _answers(table: Mapping[Sample, Predicted], common: Sequence[Sample]) -> Answers:
    """Return which common samples are right, bool (n,), and their losses, float64 (n,), where the run has them."""
    import numpy as np

    from embedpipe.evaluation import MIN_PROBABILITY

    found = [table[sample] for sample in common]
    right = np.array([one.predicted == one.label for one in found])
    true = [one.probability_of_label for one in found if one.probability_of_label is not None]
    return right, -np.log(np.clip(true, MIN_PROBABILITY, 1.0)) if len(true) == len(found) else None


def _compared(run: Run, n_split: int, right: np.ndarray, losses: np.ndarray | None) -> Compared:
    from embedpipe.evaluation import mean_interval, wilson_interval

    correct, n = int(right.sum()), len(right)
    loss, interval = (None, None) if losses is None else (float(losses.mean()), mean_interval(losses))
    return Compared(run.name, correct / n, list(wilson_interval(correct, n)), loss, interval, n_split)


def _pair(names: tuple[str, str], first: Answers, other: Answers) -> Pair:
    from embedpipe.evaluation import mcnemar, mean_interval, paired_interval

    (right, losses), (other_right, other_losses) = first, other
    b, c, n = int((right & ~other_right).sum()), int((other_right & ~right).sum()), len(right)
    gaps = None if losses is None or other_losses is None else other_losses - losses
    loss, interval = (None, None) if gaps is None else (float(gaps.mean()), mean_interval(gaps))
    return Pair(*names, (c - b) / n, list(paired_interval(b, c, n)), b, c, mcnemar(b, c), loss, interval)

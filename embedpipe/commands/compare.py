"""compare: paired comparison of runs on the same samples.

Two accuracies may differ significantly although their intervals overlap: the runs predict the same images, and the images on
which they disagree decide which run is better.

>>> compare(["fit-head-run", "finetune-run"]).pairs[0].p_value
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import UsageError, warn
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
    classifiers, predictions = zip(*(_load(run, runs_dir) for run in runs), strict=True)
    first = classifiers[0]
    for other in classifiers[1:]:
        unmatched = sorted(set(other.classes) ^ set(first.classes))
        if unmatched:
            raise UsageError(
                f"only one of {first.name} and {other.name} has the class {unmatched[0]!r}, expected the same classes",
                hint="compare runs that were fitted on the same classes",
            )
    names = [classifier.name for classifier in classifiers]
    chosen = _select_split(names, predictions) if split == "auto" else split
    by = "content" if all(one.key for found in predictions for one in found) else "path"
    tables = [_by_sample(found, chosen, by) for found in predictions]
    common = [sample for sample in tables[0] if all(sample in table for table in tables)]
    if not common:
        counts = " and ".join(f"{name} {len(table)}" for name, table in zip(names, tables, strict=True))
        hint = "compare runs that were fitted on the same data set, or name another --split"
        raise UsageError(f"the runs have no common sample in {chosen}, by {by} and label: {counts}", hint=hint)
    most = max(len(table) for table in tables)
    if len(common) < most:
        warn(f"{len(common)} of {most} images of {chosen} are in all runs")
    outcomes = [_outcomes(table, common) for table in tables]
    compared = [_compared(name, len(table), *one) for name, table, one in zip(names, tables, outcomes, strict=True)]
    keys = list(dict.fromkeys(name for name, _, _ in common)) if by == "content" else []
    pairs = [
        _pair((first.name, other.name), outcomes[0], one, cka=_cka(first, other, keys, Path(cache_dir)))
        for other, one in zip(classifiers[1:], outcomes[1:], strict=True)
    ]
    tuned = tuple(one.name for one in classifiers if one.report.get("chosen_on") == chosen)
    return Comparison(chosen, len(common), by, tuple(compared), tuple(pairs), tuned)


def _load(run: Classifier | PathLike, runs_dir: PathLike) -> tuple[Classifier, list[Predicted]]:
    """Return the classifier of a run and its predictions."""
    from embedpipe.classifier import Classifier, read_predictions

    classifier = Classifier.of(run, runs_dir)
    if classifier.folder is None:
        raise UsageError("got a classifier without a run folder, expected one returned by fit_head or finetune")
    if classifier.task != "single":
        hint = "compare the metrics and intervals in their run.json"
        raise UsageError(f"{classifier.name} is a run of {classifier.task} targets, expected single labels", hint=hint)
    return classifier, read_predictions(classifier.folder)


def _by_sample(predictions: Sequence[Predicted], split: str, by: str) -> dict[SampleId, Predicted]:
    """Return the predictions of a split by sample id."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for one in predictions:
        if one.split == split:
            name = (one.key if by == "content" else one.path, one.label)
            found[(*name, seen[name])] = one
            seen[name] += 1
    return found


def _cka(first: Classifier, other: Classifier, keys: Sequence[str], cache_dir: Path) -> float | None:
    """Return the CKA of the features of two runs on the images (hexadecimal keys) whose features the cache has for both."""
    from embedpipe.cache import Cache
    from embedpipe.evaluation import linear_cka

    if first.reference.extra or other.reference.extra:
        return None
    views = [run.reference.space(Cache(cache_dir)).view() for run in (first, other)]
    both = [key for key in map(bytes.fromhex, keys) if all(key in view for view in views)]
    if len(both) < MIN_CKA_IMAGES:
        return None
    found = linear_cka(*(view.read(both) for view in views))
    return found if found == found else None


def _select_split(names: Sequence[str], predictions: Sequence[Sequence[Predicted]]) -> str:
    """Return "test", or "val" with a warning if a run has no test split."""
    for name, found in zip(names, predictions, strict=True):
        if all(one.split != "test" for one in found):
            warn(f"{name} has no test split; the runs are compared on val")
            return "val"
    return "test"


def _outcomes(table: Mapping[SampleId, Predicted], common: Sequence[SampleId]) -> Outcomes:
    """Return whether each common sample is predicted correctly, bool (n,), and the losses, float64 (n,), if the run has them."""
    import numpy as np

    from embedpipe.evaluation import negative_log

    found = [table[sample] for sample in common]
    right = np.array([one.predicted == one.label for one in found])
    true = [one.probability_of_label for one in found if one.probability_of_label is not None]
    return right, negative_log(true) if len(true) == len(found) else None


def _compared(run: str, n_split: int, right: np.ndarray, losses: np.ndarray | None) -> Compared:
    from embedpipe.evaluation import mean_interval, wilson_interval

    correct, n = int(right.sum()), len(right)
    loss, interval = (None, None) if losses is None else (float(losses.mean()), mean_interval(losses))
    return Compared(run, correct / n, list(wilson_interval(correct, n)), loss, interval, n_split)


def _pair(names: tuple[str, str], first: Outcomes, other: Outcomes, *, cka: float | None) -> Pair:
    from embedpipe.evaluation import mcnemar, mean_interval, paired_interval

    (right, losses), (other_right, other_losses) = first, other
    b, c, n = int((right & ~other_right).sum()), int((other_right & ~right).sum()), len(right)
    gaps = None if losses is None or other_losses is None else other_losses - losses
    loss, interval = (None, None) if gaps is None else (float(gaps.mean()), mean_interval(gaps))
    return Pair(*names, (c - b) / n, list(paired_interval(b, c, n)), b, c, mcnemar(b, c), loss, interval, cka)

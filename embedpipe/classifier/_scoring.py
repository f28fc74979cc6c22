"""What a head predicted for each split, scored and written into a run folder; and read back from there.

>>> scores = report_scores({"val": scored_val, "test": scored_test}, ("cat", "dog"))
>>> scores["metrics"]["test"]["accuracy_ci95"]
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.data import SEPARATOR, Manifest, Sample, targets
from embedpipe.errors import EmbedpipeWarning, ModelMismatch, UsageError
from embedpipe.evaluation import (
    TEMPERATURES,
    THRESHOLD,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    per_class,
    reliability,
    scale_temperature,
    score_fully,
    score_multilabel,
    score_regression,
)
from embedpipe.heads import KnnHead, LinearHead
from embedpipe.runs import RunFolder, csv_text

if TYPE_CHECKING:
    from embedpipe.features import FeatureSet

PREDICTIONS = "predictions.csv"
COLUMNS = ("path", "split", "label", "predicted", "probability", "key", "probability_of_label")
WORST = 3  # classes that a report names


@dataclass(frozen=True)
class Scored:
    """samples : n Sample with a label, probabilities : float64 (n, C), or numbers (n, 1), as the task has it."""

    samples: tuple[Sample, ...]
    probabilities: np.ndarray
    task: str = "single"

    def labels(self, classes: Sequence[str]) -> np.ndarray:
        """Return class indices int64 (n,), labels float32 (n, C) or numbers float64 (n,)."""
        return targets(self.samples, classes, self.task)

    def metrics(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the scores: as `score_fully`, `score_multilabel` or `score_regression` gives them."""
        y = self.labels(classes)
        if self.task == "regression":
            return score_regression(self.probabilities[:, 0], y)
        return score_fully(self.probabilities, y) if self.task == "single" else score_multilabel(self.probabilities, y)


@dataclass(frozen=True)
class Predicted:
    """One line of predictions.csv.

    key : str                              sha256 of the image's bytes, hexadecimal; "" in old runs
    probability_of_label : float or None   None in old runs
    """

    path: str
    split: str
    label: str
    predicted: str
    key: str
    probability_of_label: float | None


def report_scores(
    scored: Mapping[str, Scored], classes: Sequence[str], *, applied: float | None = None, unseen_val: bool = True
) -> dict[str, Any]:
    """Return what a report says of the predictions of each split.

    Parameters
    ----------
    applied : float      the temperature that is folded into the head already
    unseen_val : bool    whether no image of val was fitted on

    Returns
    -------
    dict
        `metrics`: by split, as `Scored.metrics` gives them, always of the head as it is saved; `worst_classes`:
        {split, classes} with up to three rows of per_class.csv, of test, or val where there is none; null for two
        classes and for numbers. `calibration`: {temperature, fitted_on, at_bound, applied, splits: {split: {before, after:
        {log_loss, ece}}}, reliability: {split: {before, after: [{low, high, n, confidence, accuracy}]}}}; before and after
        the temperature; null without a val that can be fitted on, and but for single labels.
    """
    single = all(one.task == "single" for one in scored.values())
    last = next((split for split in ("test", "val") if split in scored and len(classes) > 2), None)
    return {
        "metrics": {split: one.metrics(classes) for split, one in scored.items()},
        "worst_classes": last and {"split": last, "classes": worst_classes(scored[last], classes)},
        "calibration": _calibration(scored, classes, applied) if single and unseen_val and "val" in scored else None,
    }


def class_table(scored: Scored, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row a class: class, n, precision, recall, recall_ci95, f1; None where a value does not exist."""
    rows = per_class(confusion_of(scored, classes)) if scored.task == "single" else _per_label(scored, classes)
    return [{"class": name, **row} for name, row in zip(classes, rows, strict=True)]


def _per_label(scored: Scored, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of `per_class` for each label, which is predicted from 0.5 on."""
    predicted, y = (scored.probabilities >= THRESHOLD).astype(np.int64), scored.labels(classes).astype(np.int64)
    return [per_class(confusion_matrix(y[:, c], predicted[:, c], 2))[1] for c in range(len(classes))]


def worst_classes(scored: Scored, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the classes that occur and have the lowest F1, the worst first."""
    rows = [row for row in class_table(scored, classes) if row["n"]]
    return sorted(rows, key=lambda row: (row["f1"], row["class"]))[:WORST]


def write_scored(run: RunFolder, scored: Mapping[str, Scored], classes: Sequence[str], manifest: Manifest) -> None:
    """Write predictions.csv; per_class.csv, but for numbers; and of single labels a confusion-<split>.csv for each split."""
    run.write_csv(PREDICTIONS, [COLUMNS, *_prediction_rows(scored, classes, manifest)])
    head = ("split", "class", "n", "precision", "recall", "recall_low", "recall_high", "f1")
    rows = [
        (split, row["class"], row["n"], row["precision"], row["recall"], *(row["recall_ci95"] or ("", "")), row["f1"])
        for split, one in scored.items()
        if one.task != "regression"
        for row in class_table(one, classes)
    ]
    if rows:
        run.write_csv("per_class.csv", [head, *rows])
    for split, one in scored.items():
        if one.task == "single":
            run.write_text(f"confusion-{split}.csv", confusion_csv(classes, confusion_of(one, classes)))


def confusion_csv(classes: Sequence[str], confusion: np.ndarray) -> str:
    """Return a confusion matrix as CSV: a header of predicted classes, then a row a true class."""
    rows = ([name, *row.tolist()] for name, row in zip(classes, confusion, strict=True))
    return csv_text([("true\\predicted", *classes), *rows])


def read_predictions(folder: Path) -> list[Predicted]:
    """Return what `predictions.csv` of a run holds.

    Raises
    ------
    ModelMismatch    it is missing, or is not what embedpipe writes
    """
    path = folder / PREDICTIONS
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            lines = csv.DictReader(stream)
            if not {*COLUMNS[:4]} <= {*(lines.fieldnames or ())}:
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
            return [_predicted(row) for row in lines]
    except (OSError, ValueError, csv.Error) as exc:
        raise ModelMismatch(f"{path} is not readable ({exc})", hint="fit the head again") from exc


def calibrated(head: LinearHead | KnnHead, features: FeatureSet, *, unseen_val: bool = True) -> LinearHead:
    """Return the head with weight and bias divided by the temperature that fits val; its arg max stays.

    Where val has no best temperature (none of its images is wrong, say), the head stays as it is, with a warning.

    Raises
    ------
    UsageError    no linear head, no val, or a val that was fitted on
    """
    if not isinstance(head, LinearHead):
        raise UsageError(
            f"a {head.kind} head cannot be calibrated, expected a linear one", hint="leave out --calibrate"
        )
    if "val" not in features.splits or not unseen_val:
        found = "a val that is fitted on" if "val" in features.splits else f"only {', '.join(features.splits)}"
        raise UsageError(f"found {found}, expected val images to calibrate on", hint="leave out --refit or --calibrate")
    X, y = features.arrays("val")
    temperature = fit_temperature(head.predict_proba(X), y)
    if temperature in TEMPERATURES:
        message = f"no temperature is the best on val ({len(y)} images): the head is not calibrated"
        warnings.warn(message, EmbedpipeWarning, stacklevel=3)
        return head
    scale, provenance = np.float32(temperature), {**head.provenance, "temperature": temperature}
    return replace(head, weight=head.weight / scale, bias=head.bias / scale, provenance=provenance)


def _calibration(scored: Mapping[str, Scored], classes: Sequence[str], applied: float | None) -> dict[str, Any]:
    """Return the calibration block; where a temperature is folded in already, before is without it."""
    truths = {split: one.labels(classes) for split, one in scored.items()}
    raw = {
        split: scale_temperature(one.probabilities, 1 / applied) if applied else one.probabilities
        for split, one in scored.items()
    }
    temperature = applied or fit_temperature(raw["val"], truths["val"])
    stages = {"before": raw, "after": {split: scale_temperature(p, temperature) for split, p in raw.items()}}
    return {
        "temperature": temperature,
        "fitted_on": "val",
        "at_bound": temperature in TEMPERATURES,
        "applied": applied is not None,
        "splits": {split: {when: _gap(p[split], y) for when, p in stages.items()} for split, y in truths.items()},
        "reliability": {
            split: {when: reliability(p[split], y) for when, p in stages.items()} for split, y in truths.items()
        },
    }


def _gap(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    ece = expected_calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == y)
    return {"log_loss": log_loss(probabilities, y), "ece": ece}


def confusion_of(scored: Scored, classes: Sequence[str]) -> np.ndarray:
    """Return how often each class int64 (C, C) was predicted, a row a true class."""
    return confusion_matrix(scored.labels(classes), scored.probabilities.argmax(axis=1), len(classes))


def _prediction_rows(
    scored: Mapping[str, Scored], classes: Sequence[str], manifest: Manifest
) -> Iterable[Sequence[Any]]:
    for split, one in scored.items():
        for sample, row, y in zip(one.samples, one.probabilities, one.labels(classes), strict=True):
            said, probability = answer(row, classes, one.task)
            true = _probability_of(row, y, one.task)
            shown = "" if probability is None else f"{probability:.6f}"
            label = (sample.label or "").removeprefix(SEPARATOR) if one.task == "multilabel" else sample.label
            name, key = manifest.name_of(sample), sample.key.hex()
            yield name, split, label, said, shown, key, "" if true is None else f"{true:.9g}"


def answer(row: np.ndarray, classes: Sequence[str], task: str) -> tuple[str, float | None]:
    """Return in words what a head says of an image, and its probability.

    Parameters
    ----------
    row : float64 (C,)    of `LinearHead.predict_proba`

    Returns
    -------
    single        the most probable class
    multilabel    the labels with a probability of 0.5 and more, joined by "|", and the least of these; "" and None for none
    regression    the number, with as few digits as tell it from all others, and None
    """
    if task == "regression":
        return repr(float(row[0])), None
    if task == "single":
        return classes[int(row.argmax())], float(row.max())
    likely = np.flatnonzero(row >= THRESHOLD)
    return SEPARATOR.join(classes[c] for c in likely.tolist()), float(row[likely].min()) if len(likely) else None


def _probability_of(row: np.ndarray, y: Any, task: str) -> float | None:
    """Return the probability of the truth: of the class, or of exactly these labels, each for itself."""
    if task == "regression":
        return None
    return float(row[y] if task == "single" else np.where(y > 0, row, 1 - row).prod())


def _predicted(row: Mapping[str, Any]) -> Predicted:
    probability = row.get("probability_of_label")
    path, split, label, predicted = texts = [row[name] for name in COLUMNS[:4]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a line that is cut")
    known = float(probability) if probability else None
    return Predicted(path, split, label, predicted, row.get("key") or "", known)

"""Score the predictions of a head on each split, write them into a run folder and read them back.

>>> scores = report_scores({"val": scored_val, "test": scored_test}, ("cat", "dog"))
>>> scores["metrics"]["test"]["accuracy_ci95"]
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.data import LABEL_SEPARATOR, Manifest, Sample, targets
from embedpipe.errors import ModelMismatch, UsageError, warn
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
N_WORST = 3  # classes in a report
ROUNDING = 1e-6  # a relative difference of log losses that is negligible


@dataclass(frozen=True)
class Scored:
    """Predictions for labelled samples.

    Parameters
    ----------
    samples : tuple of Sample    n samples with a label
    probabilities : ndarray      float64 (n, C); predicted numbers (n, 1) of a regression
    task : str                   single, multilabel or regression
    """

    samples: tuple[Sample, ...]
    probabilities: np.ndarray
    task: str = "single"

    def labels(self, classes: Sequence[str]) -> np.ndarray:
        """Return class indices int64 (n,), labels float32 (n, C) or numbers float64 (n,)."""
        return targets(self.samples, classes, self.task)

    def metrics(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the scores of `score_fully`, `score_multilabel` or `score_regression`."""
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
    """Return the part of a report that scores the predictions of each split.

    Parameters
    ----------
    applied : float      the temperature that the head was already divided by
    unseen_val : bool    True if the head was not fitted on val

    Returns
    -------
    dict
        `metrics`: {split: `Scored.metrics`} of the head as it is saved.
        `worst_classes`: {split, classes} with up to three rows of per_class.csv, of test, or of val if there is no test;
        null for two classes and for regression.
        `calibration`: {temperature, fitted_on, at_bound, applied, splits: {split: {before, after: {log_loss, ece}}},
        reliability: {split: {before, after: [{low, high, n, confidence, accuracy}]}}}, before and after temperature
        scaling; temperature 1 and fitted_on null if no temperature lowers the log loss on val; `calibration` is
        null without an unseen val, and for other tasks than single labels.
    """
    single = all(predictions.task == "single" for predictions in scored.values())
    split = next((split for split in ("test", "val") if split in scored and len(classes) > 2), None)
    return {
        "metrics": {split: predictions.metrics(classes) for split, predictions in scored.items()},
        "worst_classes": split and {"split": split, "classes": worst_classes(scored[split], classes)},
        "calibration": _calibration(scored, classes, applied) if single and unseen_val and "val" in scored else None,
    }


def class_table(scored: Scored, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per class: class, n, precision, recall, recall_ci95, f1; None where a value is undefined.

    With several labels per image, a label is predicted if its probability is at least 0.5.
    """
    if scored.task == "single":
        rows = per_class(confusion_of(scored, classes))
    else:
        predicted, y = (scored.probabilities >= THRESHOLD).astype(np.int64), scored.labels(classes).astype(np.int64)
        rows = [per_class(confusion_matrix(y[:, c], predicted[:, c], 2))[1] for c in range(len(classes))]
    return [{"class": name, **row} for name, row in zip(classes, rows, strict=True)]


def worst_classes(scored: Scored, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the classes with the lowest F1 among those with images, lowest first."""
    rows = [row for row in class_table(scored, classes) if row["n"]]
    return sorted(rows, key=lambda row: (row["f1"], row["class"]))[:N_WORST]


def write_scored(run: RunFolder, scored: Mapping[str, Scored], classes: Sequence[str], manifest: Manifest) -> None:
    """Write predictions.csv, per_class.csv (not for regression) and confusion-<split>.csv (only for single labels)."""
    run.write_csv(PREDICTIONS, [COLUMNS, *_prediction_rows(scored, classes, manifest)])
    header = ("split", "class", "n", "precision", "recall", "recall_low", "recall_high", "f1")
    rows = [
        (split, row["class"], row["n"], row["precision"], row["recall"], *(row["recall_ci95"] or ("", "")), row["f1"])
        for split, predictions in scored.items()
        if predictions.task != "regression"
        for row in class_table(predictions, classes)
    ]
    if rows:
        run.write_csv("per_class.csv", [header, *rows])
    for split, predictions in scored.items():
        if predictions.task == "single":
            run.write_text(f"confusion-{split}.csv", confusion_csv(classes, confusion_of(predictions, classes)))


def confusion_csv(classes: Sequence[str], confusion: np.ndarray) -> str:
    """Return a confusion matrix as CSV: a header of predicted classes, then one row per true class."""
    rows = ([name, *row.tolist()] for name, row in zip(classes, confusion, strict=True))
    return csv_text([("true\\predicted", *classes), *rows])


def read_predictions(folder: Path) -> list[Predicted]:
    """Return the lines of `predictions.csv` in a run.

    Raises
    ------
    ModelMismatch    the file is missing or has another format
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
    """Return the head with weight and bias divided by the temperature with the lowest log loss on val.

    The predicted classes do not change. If no temperature within the bounds is the best (for example if every val image is
    classified correctly), or none lowers the log loss, the head is returned unchanged, with a warning.

    Raises
    ------
    UsageError    the head is not linear, there is no val, or the head was fitted on val
    """
    if not isinstance(head, LinearHead):
        raise UsageError(
            f"a {head.kind} head cannot be calibrated, expected a linear one", hint="leave out --calibrate"
        )
    if "val" not in features.splits or not unseen_val:
        got = "a val that the head was fitted on" if "val" in features.splits else f"only {', '.join(features.splits)}"
        raise UsageError(
            f"cannot calibrate: got {got}, expected unseen val images", hint="leave out --refit or --calibrate"
        )
    X, y = features.arrays("val")
    temperature = _best_temperature(head.predict_proba(X), y)
    if temperature is None or temperature in TEMPERATURES:
        warn(
            f"no temperature within the bounds lowers the log loss on val ({len(y)} images): the head is not calibrated"
        )
        return head
    scale, provenance = np.float32(temperature), {**head.provenance, "temperature": temperature}
    return replace(head, weight=head.weight / scale, bias=head.bias / scale, provenance=provenance)


def _calibration(scored: Mapping[str, Scored], classes: Sequence[str], applied: float | None) -> dict[str, Any]:
    """Return the calibration block; if a temperature was applied to the head, `before` is without it."""
    truths = {split: predictions.labels(classes) for split, predictions in scored.items()}
    raw = {split: predictions.probabilities for split, predictions in scored.items()}
    if applied:
        raw = {split: scale_temperature(p, 1 / applied) for split, p in raw.items()}
    fitted = applied or _best_temperature(raw["val"], truths["val"])
    temperature = fitted or 1.0
    stages = {"before": raw, "after": {split: scale_temperature(p, temperature) for split, p in raw.items()}}
    return {
        "temperature": temperature,
        "fitted_on": "val" if fitted else None,
        "at_bound": temperature in TEMPERATURES,
        "applied": applied is not None,
        "splits": {split: {when: _gap(p[split], y) for when, p in stages.items()} for split, y in truths.items()},
        "reliability": {
            split: {when: reliability(p[split], y) for when, p in stages.items()} for split, y in truths.items()
        },
    }


def _best_temperature(probabilities: np.ndarray, y: np.ndarray) -> float | None:
    """Return the temperature with the lowest log loss, or None if it does not lower it beyond rounding."""
    temperature = fit_temperature(probabilities, y)
    lowest = log_loss(scale_temperature(probabilities, temperature), y)
    return temperature if lowest < (1 - ROUNDING) * log_loss(probabilities, y) else None


def _gap(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    ece = expected_calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == y)
    return {"log_loss": log_loss(probabilities, y), "ece": ece}


def confusion_of(scored: Scored, classes: Sequence[str]) -> np.ndarray:
    """Return the confusion matrix int64 (C, C), one row per true class."""
    return confusion_matrix(scored.labels(classes), scored.probabilities.argmax(axis=1), len(classes))


def _prediction_rows(
    scored: Mapping[str, Scored], classes: Sequence[str], manifest: Manifest
) -> Iterable[Sequence[Any]]:
    for split, predictions in scored.items():
        task, y = predictions.task, predictions.labels(classes)
        for sample, row, target in zip(predictions.samples, predictions.probabilities, y, strict=True):
            predicted, probability = answer(row, classes, task)
            of_label = _probability_of(row, target, task)
            shown = "" if probability is None else f"{probability:.6f}"
            label = (sample.label or "").removeprefix(LABEL_SEPARATOR) if task == "multilabel" else sample.label
            name, key = manifest.display_name(sample), sample.key.hex()
            yield name, split, label, predicted, shown, key, "" if of_label is None else f"{of_label:.9g}"


def answer(row: np.ndarray, classes: Sequence[str], task: str) -> tuple[str, float | None]:
    """Return the prediction for an image as text, and its probability.

    Parameters
    ----------
    row : float64 (C,)    a row of `LinearHead.predict_proba`

    Returns
    -------
    single        the most probable class
    multilabel    the labels with a probability of at least 0.5, joined by "|", and the lowest of these probabilities;
                  "" and None without such labels
    regression    the shortest text that reads back as the same number, and None
    """
    if task == "regression":
        return repr(float(row[0])), None
    if task == "single":
        return classes[int(row.argmax())], float(row.max())
    likely = np.flatnonzero(row >= THRESHOLD)
    return LABEL_SEPARATOR.join(classes[c] for c in likely.tolist()), float(row[likely].min()) if len(likely) else None


def _probability_of(row: np.ndarray, y: Any, task: str) -> float | None:
    """Return the probability of the true class, or of exactly the true labels if they are independent."""
    if task == "regression":
        return None
    return float(row[y] if task == "single" else np.where(y > 0, row, 1 - row).prod())


def _predicted(row: Mapping[str, Any]) -> Predicted:
    probability = row.get("probability_of_label")
    path, split, label, predicted = texts = [row[name] for name in COLUMNS[:4]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a truncated line")
    known = float(probability) if probability else None
    return Predicted(path, split, label, predicted, row.get("key") or "", known)

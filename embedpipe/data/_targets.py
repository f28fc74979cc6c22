"""Targets: what is to be learnt of an image, which is the task of a data set.

"single"        the column `label`: one class
"multilabel"    `labels`: any number of names, `a|b` or a list; an empty value says that none applies
"regression"    `target`: a number

A label is kept as text everywhere, and `targets` alone turns samples into numbers.

>>> targets(manifest.samples, manifest.classes, manifest.task)
array([0, 1, 0])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from embedpipe.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.data._manifest import Sample

TASKS = {"label": "single", "labels": "multilabel", "target": "regression"}  # by column
LARGEST = 1e100  # of a target: its square is a number, too
SEPARATOR = "|"  # between names; alone it is the text of an image to which none applies


def join_names(names: Iterable[str]) -> str:
    """Return the text of some names, the same for the same set."""
    return SEPARATOR.join(sorted(set(names))) or SEPARATOR


def names_of(label: str, task: str) -> tuple[str, ...]:
    """Return the classes that a label names; those of a number are none."""
    if task == "multilabel":
        return tuple(name for name in map(str.strip, label.split(SEPARATOR)) if name)
    return (label,) if task == "single" else ()


def classes_of(labels: Iterable[str], task: str) -> tuple[str, ...]:
    """Return what a head on these labels answers, sorted plainly: class names, or the one name `target`."""
    texts = set(labels)
    if task == "regression":
        return ("target",) if texts else ()
    return tuple(sorted({name for text in texts for name in names_of(text, task)}))


def read_target(cells: Mapping[str, str], at: str) -> tuple[str | None, str]:
    """Return the label that the cells of a row say, None where they say none, and the task of its column.

    Raises
    ------
    UsageError    a target that is no number
    """
    column = next((column for column in TASKS if column in cells), "label")
    text, task = cells.get(column, "").strip(), TASKS[column]
    if task == "multilabel":
        return join_names(names_of(text, task)), task
    if task == "regression" and text:
        _check_number(text, at)
    return text or None, task


def _check_number(text: str, at: str) -> None:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{at}: target {text!r} is no finite number", hint="write numbers with a point, such as 3.5")
    if abs(value) > LARGEST:
        raise UsageError(f"{at}: target {text!r}, expected at most {LARGEST:g}", hint="write it in a larger unit")


def check_columns_of_targets(names: Sequence[str], at: str) -> None:
    """Refuse columns of two tasks."""
    found = [name for name in TASKS if name in names]
    if len(found) > 1:
        raise UsageError(
            f"{at}: found the columns {' and '.join(found)}, expected one of label, labels and target",
            hint="keep the one to learn, and rename the other",
        )


def targets(samples: Sequence[Sample], classes: Sequence[str], task: str) -> np.ndarray[Any, Any]:
    """Return the labels of samples as numbers.

    Returns
    -------
    single        int64 (N,), the class index, -1 for none of `classes`
    multilabel    float32 (N, C), 1 where the name applies, else 0
    regression    float64 (N,), NaN without a label
    """
    import numpy as np

    labels = [sample.label for sample in samples]
    if task == "regression":
        return np.array([math.nan if label is None else float(label) for label in labels], dtype=np.float64)
    index = {name: number for number, name in enumerate(classes)}
    if task == "single":
        return np.array([-1 if label is None else index.get(label, -1) for label in labels], dtype=np.int64)
    y = np.zeros((len(samples), len(classes)), dtype=np.float32)
    for row, label in zip(y, labels, strict=True):
        row[[index[name] for name in names_of(label or "", task) if name in index]] = 1
    return y

"""Labels: the three label columns, the task that each means, and the text form of a label.

`label`     "single": one class
`labels`    "multilabel": any number of class names, as `a|b` or a list; an empty value means that none applies
`target`    "regression": a number

A label is stored as text; `Manifest.targets` encodes it as numbers.

>>> label_of_cells({"path": "1.png", "labels": "dog|cat"}, "list.csv, line 2")
('cat|dog', 'multilabel')
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from embedpipe.errors import UsageError

TASK_OF_COLUMN = {"label": "single", "labels": "multilabel", "target": "regression"}  # by column
MAX_TARGET = 1e100  # the square of a target must be finite
LABEL_SEPARATOR = "|"  # between class names; alone, it is the label of an image to which no class applies


def join_names(names: Iterable[str]) -> str:
    """Return the multilabel text of class names, which does not depend on their order."""
    return LABEL_SEPARATOR.join(sorted(set(names))) or LABEL_SEPARATOR


def label_names(label: str, task: str) -> tuple[str, ...]:
    """Return the class names in a label; () for regression."""
    if task == "multilabel":
        return tuple(name for name in map(str.strip, label.split(LABEL_SEPARATOR)) if name)
    return (label,) if task == "single" else ()


def classes_of(labels: Iterable[str], task: str) -> tuple[str, ...]:
    """Return the sorted class names in labels; ("target",) for regression, () without labels."""
    texts = set(labels)
    if task == "regression":
        return ("target",) if texts else ()
    return tuple(sorted({name for text in texts for name in label_names(text, task)}))


def label_of_cells(cells: Mapping[str, str], at: str) -> tuple[str | None, str]:
    """Return the label in the cells of a row, None if it is empty, and the task of its column.

    Raises
    ------
    UsageError    the target is not a finite number
    """
    column = next((column for column in TASK_OF_COLUMN if column in cells), "label")
    text, task = cells.get(column, "").strip(), TASK_OF_COLUMN[column]
    if task == "multilabel":
        return join_names(label_names(text, task)), task
    if task == "regression" and text:
        _check_number(text, at)
    return text or None, task


def class_label(label: str | None, task: str, classes: Sequence[str]) -> str | None:
    """Return a label with class names for class numbers, unless `classes` is empty; -1 is no label.

    Raises
    ------
    UsageError    a number without a name
    """
    if label is None or not classes or task == "regression":
        return label
    numbers = [number for number in label_names(label, task) if number != "-1"]
    for number in numbers:
        if not number.isdigit() or int(number) >= len(classes):
            hint = "write the file again with numbers of its class names"
            raise UsageError(f"found the label {number!r}, expected 0 to {len(classes) - 1}", hint=hint)
    names = [classes[int(number)] for number in numbers]
    return join_names(names) if task == "multilabel" else next(iter(names), None)


def _check_number(text: str, at: str) -> None:
    try:
        is_valid = abs(float(text)) <= MAX_TARGET
    except ValueError:
        is_valid = False
    if not is_valid:
        hint = "write numbers with a point, such as 3.5, in a unit that keeps them smaller"
        raise UsageError(f"{at}: target {text!r}, expected a number of at most {MAX_TARGET:g}", hint=hint)


def check_label_columns(columns: Collection[str], at: str) -> None:
    """Raise UsageError for more than one label column."""
    found = [column for column in TASK_OF_COLUMN if column in columns]
    if len(found) > 1:
        message = f"{at}: found the columns {' and '.join(found)}, expected one of label, labels and target"
        raise UsageError(message, hint="keep the one to predict, and rename the others")

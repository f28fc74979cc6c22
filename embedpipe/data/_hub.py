"""hf:NAME: data sets that the `datasets` library loads from the Hub, its cache, or a folder that it saved.

Images are in the first column of the feature type `Image`. Labels are in `label`, `class`, the only column of the type
`ClassLabel`, `labels` or `target`, whichever is there first. Splits are those of the data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from embedpipe.data._folder import SPLIT_NAMES, drop_incomplete
from embedpipe.data._labels import class_label, label_of_cells
from embedpipe.data._parquet import bytes_of_cell
from embedpipe.data._source import HUB, Listing, Row, Source, parse_hub
from embedpipe.data._tables import cell_texts
from embedpipe.errors import UsageError

SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


def list_hub(source: Source) -> Listing:
    """List the images of all splits of a data set, or of the split that is named.

    Raises
    ------
    UsageError    the data set does not load, or has no images
    """
    open_split.cache_clear()  # what is read now is what is there now
    _open_column.cache_clear()
    root, split = parse_hub(source.argument)
    loaded = open_split(root, split)
    splits = {split: loaded} if split else loaded
    rows = tuple(row for name, dataset in splits.items() for row in _rows(source, name, dataset))
    return drop_incomplete(Listing(source, rows), "have neither label nor split, unlike others,")


def _rows(source: Source, split: str, dataset: Any) -> Iterator[Row]:
    import datasets

    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image) and "/" not in name]
    if not images:
        message = f"{source.argument!r} has the columns {', '.join(features)}, expected a column of images"
        raise UsageError(message, hint="name a data set of images")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    candidates = ("label", "class", *(classes if len(classes) == 1 else ()), "labels", "target")
    column = next((name for name in candidates if name in features), None)
    kind = column if column in ("labels", "target") and column not in classes else "label"
    names = getattr(getattr(features.get(column), "feature", features.get(column)), "names", ())
    split_name = SPLIT_NAMES.get(split.partition("[")[0].lower(), "")
    for n, value in enumerate(dataset[column][:] if column else [None] * len(dataset)):
        at = f"{source.argument}, row {n} of {split}"
        label, task = label_of_cells(cell_texts([(kind, value)], at), at)
        yield Row(split, class_label(label, task, names), split_name, None, f"row {n} {images[0]}", task)


@lru_cache(16)
def open_split(root: str, split: str) -> Any:
    """Return the `datasets.Dataset` of a split of hf:NAME[:CONFIG], or the `DatasetDict` of all splits for "".

    Raises
    ------
    UsageError    `datasets` is not installed, or the data set does not load
    """
    try:
        import datasets
    except ImportError as exc:
        raise UsageError(f"{root!r} needs datasets", hint="pip install 'embedpipe[hf]'") from exc
    text = root.removeprefix(HUB)
    name, _, config = (text, "", "") if os.path.isdir(text) else text.partition(":")
    try:
        if any(os.path.exists(os.path.join(name, file)) for file in SAVED):
            return _saved_split(datasets.load_from_disk(name), split)
        return datasets.load_dataset(name, config or None, split=split or None)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        hint = "expected hf:NAME[:CONFIG][@SPLIT], or hf:FOLDER as save_to_disk writes it"
        raise UsageError(f"{root}{'@' if split else ''}{split}: {reason}", hint=hint) from exc


def _saved_split(saved: Any, split: str) -> Any:
    """Return a split of what `load_from_disk` loaded; a single `Dataset` without a split name is train."""
    import datasets

    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    if split and split not in saved:
        raise ValueError(f"no split {split!r}, expected {' or '.join(saved)}")
    return saved[split] if split else saved


@lru_cache(64)
def _open_column(path: str, column: str) -> Any:
    import datasets

    return open_split(*path.rsplit("/", 1)).select_columns([column]).cast_column(column, datasets.Image(decode=False))


def read_hub_row(path: str, location: str) -> bytes:
    """Return the image bytes in a row of a split.

    Parameters
    ----------
    path : str        hf:NAME[:CONFIG]/SPLIT
    location : str    "row ROW COLUMN"

    Raises
    ------
    OSError    the row holds no bytes, or the file that it names cannot be read
    """
    _, row, column = location.split(" ", 2)
    cell = _open_column(path, column)[int(row)][column]
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        with open(cell["path"], "rb") as stream:
            return stream.read()
    return bytes_of_cell(cell)


def hub_version(path: str) -> str | None:
    """Return the fingerprint that `datasets` gives a split."""
    fingerprint = getattr(open_split(*path.rsplit("/", 1)), "_fingerprint", None)
    return fingerprint if isinstance(fingerprint, str) else None

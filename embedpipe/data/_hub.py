"""hf:NAME: data sets that the `datasets` library loads from the Hub, its cache, or a folder that it saved.

Images are in the first column of the feature type `Image`. Labels are in `label`, `class`, the only column of the type
`ClassLabel`, `labels` or `target`, whichever is there first. Splits are those of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from embedpipe.data._folder import SPLIT_NAMES, drop_incomplete
from embedpipe.data._labels import label_of_cells
from embedpipe.data._manifest import Listing, Row
from embedpipe.data._source import Source
from embedpipe.data._stored_rows import forget_splits, open_split, parse_hub
from embedpipe.data._tables import cell_texts
from embedpipe.errors import UsageError


def list_hub(source: Source) -> Listing:
    """List the images of all splits of a data set, or of the split that is named.

    Raises
    ------
    UsageError    the data set does not load, or has no images
    """
    forget_splits()
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
        raise UsageError(
            f"{source.argument!r} has the columns {', '.join(features)}, expected a column of images",
            hint="name a data set of images",
        )
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    candidates = ("label", "class", *(classes if len(classes) == 1 else ()), "labels", "target")
    column = next((name for name in candidates if name in features), None)
    kind = column if column in ("labels", "target") and column not in classes else "label"
    names = getattr(getattr(features.get(column), "feature", features.get(column)), "names", None)
    split_name = SPLIT_NAMES.get(split.partition("[")[0].lower(), "")
    for n, value in enumerate(dataset[column][:] if column else [None] * len(dataset)):
        at = f"{source.argument}, row {n} of {split}"
        label, task = label_of_cells(cell_texts([(kind, _class_names(value, names))], at), at)
        yield Row(split, label, split_name, None, f"row {n} {images[0]}", task)


def _class_names(value: Any, names: list[str] | None) -> Any:
    """Return a value with class names for class numbers; -1 is no label."""
    if not names or value is None:
        return value
    if isinstance(value, list):
        return [names[number] for number in value if number >= 0]
    return names[value] if value >= 0 else None

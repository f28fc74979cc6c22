"""hf:NAME: data sets that the `datasets` library loads."""

from __future__ import annotations

from typing import Any

from embedpipe.data._folder import SPLIT_NAMES, keep_alike
from embedpipe.data._hub_images import forget_splits, open_split, parse_hub
from embedpipe.data._manifest import Listing, Row
from embedpipe.data._source import Source
from embedpipe.data._table import texts_of
from embedpipe.data._targets import read_target
from embedpipe.errors import UsageError


def list_hub(source: Source) -> Listing:
    """Read all splits of a data set, or the one that is named.

    Raises
    ------
    UsageError    it cannot be loaded, or has no images
    """
    forget_splits()
    root, split = parse_hub(source.argument)
    found = open_split(root, split)
    splits = {split: found} if split else dict(found)
    rows = [row for name, one in splits.items() for row in _rows(source, name, one)]
    return keep_alike(Listing(source, tuple(rows)), "have neither label nor split, unlike others,")


def _rows(source: Source, split: str, found: Any) -> list[Row]:
    """Return a row for each image of a `Dataset`."""
    import datasets

    features = found.features
    image = next((name for name, one in features.items() if isinstance(one, datasets.Image) and "/" not in name), None)
    if image is None:
        raise UsageError(
            f"{source.argument!r} has the columns {', '.join(features)}, expected one of images",
            hint="name a data set of images",
        )
    classes = [name for name, one in features.items() if isinstance(one, datasets.ClassLabel)]
    told = ("label", "class", *classes[: len(classes) == 1], "labels", "target")
    column = next((name for name in told if name in features), None)
    values = found[column][:] if column else [None] * len(found)
    kind = column if column in ("labels", "target") and column not in classes else "label"
    names = getattr(getattr(features.get(column), "feature", features.get(column)), "names", None)
    named = SPLIT_NAMES.get(split.partition("[")[0].lower(), "")
    rows = []
    for n, value in enumerate(values):
        at = f"{source.argument}, row {n} of {split}"
        label, task = read_target(texts_of([(kind, _named(value, names))], at), at)
        rows.append(Row(split, label, named, None, f"row {n} {image}", task))
    return rows


def _named(value: Any, names: list[str] | None) -> Any:
    """Return a value with class names for numbers; -1 is none."""
    if not names or value is None:
        return value
    if isinstance(value, list):
        return [names[one] for one in value if one >= 0]
    return names[value] if value >= 0 else None

"""hf:NAME: data sets that the `datasets` library loads."""

from __future__ import annotations

from typing import Any

from embedpipe.errors import UsageError
from embedpipe.manifest._folder import SPLIT_NAMES, keep_alike
from embedpipe.manifest._sample import Listing, Row
from embedpipe.manifest._source import Source
from embedpipe.places import forget_splits, open_split, parse_hub


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
    label = next((name for name in ("label", "class", *classes[: len(classes) == 1]) if name in features), None)
    values = found[label][:] if label else [None] * len(found)
    names = features[label].names if label in classes else None
    named = SPLIT_NAMES.get(split.partition("[")[0].lower(), "")
    return [Row(split, _label(value, names), named, None, f"row {n} {image}") for n, value in enumerate(values)]


def _label(value: Any, names: list[str] | None) -> str | None:
    if value is None or (names and value < 0):
        return None
    return names[value] if names else str(value)

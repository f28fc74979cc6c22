"""read_manifest: the one door from DATA arguments to a Manifest."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from embedpipe.errors import UsageError
from embedpipe.manifest._folder import IMAGE_SUFFIXES, list_folder
from embedpipe.manifest._sample import TABLE_SUFFIXES, Failure, Listing, Manifest, Row, Sample, Source
from embedpipe.manifest._split import assign_splits
from embedpipe.manifest._table import list_table


def read_manifest(
    data: Sequence[str | os.PathLike[str]],
    *,
    key_of: Callable[[Path], bytes],
    split_by: str = "auto",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    limit: int | None = None,
    allow_outside: bool = False,
) -> Manifest:
    """Read class folders, flat folders and tables as one data set.

    Parameters
    ----------
    data : sequence of path     folders, or .csv, .tsv, .jsonl tables
    key_of : path -> bytes      32-byte content key; an OSError puts the file among `unreadable`
    split_by : str              "auto" (as the data say, else hash), "folder", "column", "hash"
    val_fraction : float        share of val in a hash split, or of what is carved from train
    test_fraction : float       share of test in a hash split
    limit : int or None         that many images, in turn from every class and named split
    allow_outside : bool        let a table name files outside its folder

    Raises
    ------
    UsageError    nothing there, no image, or data that contradict themselves; the place is named
    """
    _check_options(split_by, val_fraction, test_fraction, limit)
    arguments = [data] if isinstance(data, str | os.PathLike) else data
    listings = [_list_source(os.fspath(argument), allow_outside) for argument in arguments]
    _check_listings(listings, split_by)
    rows = [(index, row) for index, listing in enumerate(listings) for row in listing.rows]
    samples, unreadable = _read_keys(_limited(rows, limit), listings, key_of)
    if split_by == "hash":
        samples = [replace(sample, split="") for sample in samples]
    samples, warnings = assign_splits(samples, val_fraction=val_fraction, test_fraction=test_fraction)
    classes = tuple(sorted({sample.label for sample in samples if sample.label is not None}))
    return Manifest(
        name=_name([listing.source for listing in listings]),
        sources=tuple(listing.source for listing in listings),
        samples=tuple(samples),
        classes=classes,
        ignored=sum(listing.ignored for listing in listings),
        unreadable=(*(f for listing in listings for f in listing.unreadable), *unreadable),
        warnings=(*(text for listing in listings for text in listing.warnings), *warnings, *_one_class(classes)),
    )


def _check_options(split_by: str, val_fraction: float, test_fraction: float, limit: int | None) -> None:
    if split_by not in ("auto", "folder", "column", "hash"):
        raise UsageError(f"split_by {split_by!r}", hint="expected auto, folder, column or hash")
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise UsageError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction}",
            hint="expected two numbers from 0 up with a sum below 1",
        )
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}", hint="expected 1 or more")


def _list_source(argument: str, allow_outside: bool) -> Listing:
    path = Path(os.path.abspath(argument))
    if path.is_dir():
        return list_folder(Source(argument, path))
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return list_table(Source(argument, path.parent), path, allow_outside=allow_outside)
    raise UsageError(
        f"{argument!r} {'is another kind of file' if path.exists() else 'does not exist'}, "
        "expected a folder of images or a .csv, .tsv or .jsonl table",
        hint="give the folder that holds it" if path.exists() else "check the path",
    )


def _check_listings(listings: list[Listing], split_by: str) -> None:
    """Every source has images; all or none have labels, and splits where these are asked for."""
    if not listings:
        raise UsageError("no data named", hint="give a folder of images or a table")
    for listing in listings:
        if not listing.rows:
            others = [failure.reason for failure in listing.unreadable[:1]]
            raise UsageError(
                f"no image in {listing.source.argument!r} "
                f"({', '.join([*others, f'{listing.ignored} other files'])}), "
                f"expected {' '.join(IMAGE_SUFFIXES)}",
                hint="put a folder of images for each class there, or name another path",
            )
    _check_all_or_none(listings, "label")
    if split_by != "hash":
        _check_all_or_none(listings, "split")
    for listing in listings if split_by in ("folder", "column") else ():
        kind = "column" if listing.source.is_table else "folder"
        if kind != split_by or not listing.rows[0].split:
            raise UsageError(
                f"{listing.source.argument!r} has no splits by {split_by}",
                hint="expected the folders train/ val/ test/, or a table with a split column",
            )


def _check_all_or_none(listings: list[Listing], field: str) -> None:
    """A source has a field in every row or in none, so that its first row speaks for it."""
    having = {bool(getattr(x.rows[0], field)): x.source.argument for x in listings}
    if len(having) > 1:
        raise UsageError(
            f"{having[True]!r} has {field}s, {having[False]!r} has none, expected all or none",
            hint="extract them one by one" + (", or split by hash" if field == "split" else ""),
        )


def _limited(rows: list[tuple[int, Row]], limit: int | None) -> list[tuple[int, Row]]:
    """Take turns between classes and splits: a small limit sees all, a larger one contains it."""
    seen: Counter[tuple[str, str | None]] = Counter()
    turns = []
    for order, (_, row) in enumerate(rows):
        turns.append((seen[row.split, row.label], order))
        seen[row.split, row.label] += 1
    return [rows[order] for order in sorted(order for _, order in sorted(turns)[:limit])]


def _read_keys(
    rows: list[tuple[int, Row]], listings: list[Listing], key_of: Callable[[Path], bytes]
) -> tuple[list[Sample], list[Failure]]:
    samples, unreadable = [], []
    for index, row in rows:
        source = listings[index].source
        try:
            key = key_of(source.root / row.path)
        except OSError as exc:
            name = os.path.join(source.prefix, row.path)
            unreadable.append(Failure(name, "read", exc.strerror or str(exc)))
        else:
            samples.append(Sample(row.path, row.label, row.split, row.group, key, index))
    if not samples:
        raise UsageError(
            f"no image can be read, first of {len(unreadable)}: {unreadable[0].path!r}: {unreadable[0].reason}",
            hint="check paths and permissions; paths in a table are relative to its folder",
        )
    return samples, unreadable


def _one_class(classes: tuple[str, ...]) -> list[str]:
    if len(classes) != 1:
        return []
    return [f"one class only, {classes[0]!r}: no head can be fitted; is it a folder of classes?"]


def _name(sources: Sequence[Source]) -> str:
    first = Path(sources[0].argument).stem if sources[0].is_table else sources[0].root.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", first).strip("-.") or "data"
    return name if len(sources) == 1 else f"{name}-and-{len(sources) - 1}-more"

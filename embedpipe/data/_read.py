"""read_manifest: the one door from DATA arguments to a Manifest."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from embedpipe.data._byte_source import Place
from embedpipe.data._folder import IMAGE_SUFFIXES, keep_alike, list_folder, unreadable_folders, walk
from embedpipe.data._hub_dataset import list_hub
from embedpipe.data._hub_images import HUB
from embedpipe.data._manifest import Failure, Listing, Manifest, Row, Sample, name_of
from embedpipe.data._parquet_dataset import list_parquet
from embedpipe.data._remote import is_url
from embedpipe.data._source import TABLE_SUFFIXES, Source, check_uncompressed, expand_braces, join, source_of, suffix_of
from embedpipe.data._splits import assign_splits
from embedpipe.data._table import list_table
from embedpipe.data._tar import list_tars
from embedpipe.data._targets import classes_of
from embedpipe.errors import EmbedpipeError, UsageError
from embedpipe.storage import PathLike

READERS, REMOTE_READERS = 8, 32  # threads that read images for their keys
MOST_AT_ONCE = 64  # images a thread takes


def read_manifest(
    data: PathLike | Sequence[PathLike],
    *,
    key_of: Callable[[Place], bytes],
    split_by: str = "auto",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    limit: int | None = None,
    allow_outside: bool = False,
) -> Manifest:
    """Read class folders, flat folders, tables, shards and hub data sets as one data set.

    Parameters
    ----------
    data : path or several      folders, .csv, .tsv, .jsonl tables, .tar or .parquet files, all of them also as URLs or
                                patterns such as "s-{000..012}.tar", or hf:NAME
    key_of : place -> bytes     32-byte content key, asked for in several threads; an OSError puts the image among `unreadable`
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
    task = _task_of(listings)
    rows = [(index, row) for index, listing in enumerate(listings) for row in listing.rows]
    samples, unreadable = _read_keys(_limited(rows, limit), listings, key_of)
    if split_by == "hash":
        samples = [replace(sample, split="") for sample in samples]
    contradicting = _two_labels(samples)
    samples, warnings = assign_splits(samples, val_fraction=val_fraction, test_fraction=test_fraction, task=task)
    classes = classes_of((sample.label for sample in samples if sample.label is not None), task)
    return Manifest(
        name=_name([listing.source for listing in listings]),
        sources=tuple(listing.source for listing in listings),
        samples=tuple(samples),
        classes=classes,
        ignored=sum(listing.ignored for listing in listings),
        unreadable=(*(f for listing in listings for f in listing.unreadable), *unreadable),
        warnings=(
            *(text for listing in listings for text in listing.warnings),
            *warnings,
            *contradicting,
            *_one_class(classes, task),
        ),
        task=task,
    )


def _two_labels(samples: Sequence[Sample]) -> list[str]:
    """Return a warning of images that have several labels, where samples of the same content disagree."""
    first: dict[bytes, Sample] = {}
    pairs = {
        one.key: (first[one.key], one)
        for one in samples
        if one.label is not None and first.setdefault(one.key, one).label != one.label
    }
    if not pairs:
        return []
    one, other = next(iter(pairs.values()))
    where = one.path if one.path == other.path else f"{one.path} and {other.path}"
    return [f"{len(pairs)} image(s) with several labels, the first: {where}, {one.label} and {other.label}"]


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
    check_uncompressed(argument)
    source = source_of(argument)
    if source.is_hub:
        return list_hub(source)
    if not source.names_files:
        return _list_folder(source, allow_outside)
    names = [one.removeprefix(join(source.root, "")) for one in expand_braces(source.absolute)]
    absent = [
        name for name in names if not is_url(join(source.root, name)) and not os.path.isfile(join(source.root, name))
    ]
    if absent:
        raise _refusal(join(source.prefix, absent[0]), join(source.root, absent[0]))
    if suffix_of(argument) not in TABLE_SUFFIXES:
        return _list_shards(source, names, allow_outside)
    if len(names) > 1:
        raise UsageError(f"{argument!r} stands for {len(names)} tables", hint="name tables one by one")
    return list_table(source, names[0], allow_outside=allow_outside)


def _list_folder(source: Source, allow_outside: bool) -> Listing:
    if not is_url(str(source.root)) and not os.path.isdir(source.root):
        raise _refusal(source.argument, str(source.root))
    walked = walk(source.root)
    if walked.images or not walked.shards:
        return list_folder(source, walked)
    for shard in walked.shards:
        check_uncompressed(shard)
    found = _list_shards(source, walked.shards, allow_outside)
    unreadable = (*unreadable_folders(source, walked), *found.unreadable)
    return replace(found, ignored=found.ignored + walked.ignored, unreadable=unreadable)


def _list_shards(source: Source, names: Sequence[str], allow_outside: bool) -> Listing:
    """Read .tar or .parquet files, named relative to the root of the source, as one source."""
    suffixes = {suffix_of(name) for name in names}
    if len(suffixes) > 1:
        raise UsageError(
            f"found {' and '.join(sorted(suffixes))} files in {source.argument!r}, expected one kind",
            hint="name one kind by a pattern such as 'data/train-{000..012}.tar'",
        )
    if suffixes == {".parquet"}:
        return keep_alike(list_parquet(source, names, allow_outside=allow_outside), "have neither label nor split")
    return list_tars(source, names)


def _refusal(argument: str, path: str) -> UsageError:
    there = os.path.exists(path)
    return UsageError(
        f"{argument!r} {'is another kind of file' if there else 'does not exist'}, expected a folder of images, "
        "a .csv, .tsv, .jsonl or .parquet table, .tar shards, a URL of one of them, or hf:NAME",
        hint="give the folder that holds it" if there else "check the path",
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
        kind = "column" if listing.source.has_columns else "folder"
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
    rows: list[tuple[int, Row]], listings: list[Listing], key_of: Callable[[Place], bytes]
) -> tuple[list[Sample], list[Failure]]:
    sources = [listing.source for listing in listings]
    places = [Place(join(sources[index].root, row.path), row.part) for index, row in rows]
    samples, unreadable = [], []
    for (index, row), key in zip(rows, _keys_of(places, key_of), strict=True):
        if isinstance(key, OSError):
            unreadable.append(Failure(name_of(sources[index], row), "read", key.strerror or str(key)))
        else:
            samples.append(Sample(row.path, row.label, row.split, row.group, key, index, row.part))
    if not samples:
        raise UsageError(
            f"no image can be read, first of {len(unreadable)}: {unreadable[0].path!r}: {unreadable[0].reason}",
            hint="check paths and permissions; paths in a table are relative to its folder",
        )
    return samples, unreadable


def _keys_of(places: Sequence[Place], key_of: Callable[[Place], bytes]) -> list[bytes | OSError]:
    """Return the key of each place, in order, or why there is none; many reads are under way at once."""

    def ask(some: Sequence[Place]) -> list[bytes | OSError]:
        return [_try(key_of, place) for place in some]

    readers = REMOTE_READERS if any(place.is_remote for place in (*places[:1], *places[-1:])) else READERS
    size = min(MOST_AT_ONCE, -(-len(places) // (4 * readers)))
    parts = [places[start : start + size] for start in range(0, len(places), size)]
    with ThreadPoolExecutor(readers, thread_name_prefix="key") as threads:
        return [key for keys in threads.map(ask, parts) for key in keys]


def _try(key_of: Callable[[Place], bytes], place: Place) -> bytes | OSError:
    try:
        return key_of(place)
    except EmbedpipeError:
        raise  # of what is missing for all
    except OSError as exc:
        return exc


def _task_of(listings: list[Listing]) -> str:
    """Return the task of all labels, "single" where there are none."""
    found = {row.task: listing.source.argument for listing in listings for row in listing.rows if row.label is not None}
    if len(found) > 1:
        (one, argument), (other, another) = list(found.items())[:2]
        raise UsageError(
            f"{argument!r} has {one} labels, {another!r} {other}, expected one kind", hint="extract them one by one"
        )
    return next(iter(found), "single")


def _one_class(classes: tuple[str, ...], task: str) -> list[str]:
    if len(classes) != 1 or task != "single":
        return []
    return [f"one class only, {classes[0]!r}: no head can be fitted; is it a folder of classes?"]


def _name(sources: Sequence[Source]) -> str:
    first = sources[0].absolute.rpartition("/")[2] if sources[0].names_files else os.path.basename(sources[0].root)
    if sources[0].names_files:
        first = os.path.splitext(first)[0]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", first.removeprefix(HUB)).strip("-.") or "data"
    return name if len(sources) == 1 else f"{name}-and-{len(sources) - 1}-more"

"""read_manifest: from DATA arguments to a Manifest.

1. List each source: its rows (path, label, split, group), without reading images.
2. Check that the sources agree, and apply `limit`.
3. Compute the key of each image, in threads.
4. Assign splits, unless the data name them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from embedpipe.data._files import is_url
from embedpipe.data._folder import IMAGE_SUFFIXES, drop_incomplete, list_folder, walk
from embedpipe.data._hub import list_hub
from embedpipe.data._labels import classes_of
from embedpipe.data._manifest import ByteSource, Manifest, Sample
from embedpipe.data._parquet import list_parquet
from embedpipe.data._source import (
    HUB,
    TABLE_SUFFIXES,
    Failure,
    Listing,
    Row,
    Source,
    check_uncompressed,
    expand_braces,
    join,
    source_of,
    suffix_of,
)
from embedpipe.data._splits import assign_splits
from embedpipe.data._tables import list_table
from embedpipe.data._tar import list_tars
from embedpipe.errors import EmbedpipeError, UsageError
from embedpipe.storage import PathLike

READERS, REMOTE_READERS = 8, 32  # threads that read images for their keys
BATCH = 64  # images that a thread takes at once, at most


def read_manifest(
    data: PathLike | Sequence[PathLike],
    *,
    key_of: Callable[[ByteSource], bytes],
    split_by: str = "auto",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    limit: int | None = None,
    allow_outside: bool = False,
) -> Manifest:
    """Read folders, tables, shards and hf data sets as one data set.

    Parameters
    ----------
    data : path or several      folders, .csv, .tsv, .jsonl tables, .tar or .parquet files, each also as a URL or a brace
                                pattern such as "s-{000..012}.tar", or hf:NAME
    key_of : ByteSource -> bytes     the 32-byte key of an image, called from several threads; an OSError makes it `unreadable`
    split_by : str              "auto" (as the data name them, else hash), "folder", "column", "hash"
    val_fraction : float        fraction of val in the hash split, or of what is taken from train
    test_fraction : float       fraction of test in the hash split
    limit : int or None         read at most this many images, in turn from each class and named split
    allow_outside : bool        let a table name files outside its folder

    Raises
    ------
    UsageError    an argument does not exist, has no image, or contradicts itself or another; the message names it
    """
    _check_options(split_by, val_fraction, test_fraction, limit)
    arguments = [data] if isinstance(data, str | os.PathLike) else data
    listings = [_list_source(os.fspath(argument), allow_outside) for argument in arguments]
    _check_listings(listings, split_by)
    task = _task_of(listings)
    sources = tuple(listing.source for listing in listings)
    rows = [(index, row) for index, listing in enumerate(listings) for row in listing.rows]
    samples, unreadable = _read_keys(_limited(rows, limit), sources, key_of)
    if split_by == "hash":
        samples = [replace(sample, split="") for sample in samples]
    contradictions = _contradictions(samples)
    samples, warnings = assign_splits(samples, val_fraction=val_fraction, test_fraction=test_fraction, task=task)
    classes = classes_of((sample.label for sample in samples if sample.label is not None), task)
    warnings = [*(text for listing in listings for text in listing.warnings), *warnings, *contradictions]
    if len(classes) == 1 and task == "single":
        warnings.append(f"one class only, {classes[0]!r}: no head can be fitted; is it a folder of classes?")
    return Manifest(
        name=_name(sources),
        sources=sources,
        samples=tuple(samples),
        classes=classes,
        ignored=sum(listing.ignored for listing in listings),
        unreadable=(*(failure for listing in listings for failure in listing.unreadable), *unreadable),
        warnings=tuple(warnings),
        task=task,
    )


def _check_options(split_by: str, val_fraction: float, test_fraction: float, limit: int | None) -> None:
    if split_by not in ("auto", "folder", "column", "hash"):
        raise UsageError(f"split_by {split_by!r}", hint="expected auto, folder, column or hash")
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        message = f"val_fraction {val_fraction} and test_fraction {test_fraction}"
        raise UsageError(message, hint="expected two numbers of at least 0 whose sum is below 1")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}", hint="expected 1 or more")


def _list_source(argument: str, allow_outside: bool) -> Listing:
    check_uncompressed(argument)
    source = source_of(argument)
    if source.is_hub:
        return list_hub(source)
    if not source.has_files:
        return _list_folder(source, allow_outside)
    names = [path.removeprefix(join(source.root, "")) for path in expand_braces(source.absolute)]
    for name in names:
        path = join(source.root, name)
        if not is_url(path) and not os.path.isfile(path):
            raise _not_data(join(source.prefix, name), path)
    if suffix_of(argument) not in TABLE_SUFFIXES:
        return _list_shards(source, names, allow_outside)
    if len(names) > 1:
        raise UsageError(f"{argument!r} names {len(names)} tables, expected one", hint="give each table as an argument")
    return list_table(source, names[0], allow_outside=allow_outside)


def _list_folder(source: Source, allow_outside: bool) -> Listing:
    """List the images below a folder, or its shards if it has no images."""
    if not is_url(str(source.root)) and not os.path.isdir(source.root):
        raise _not_data(source.argument, str(source.root))
    content = walk(source.root)
    if content.images or not content.shards:
        return list_folder(source, content)
    for shard in content.shards:
        check_uncompressed(shard)
    listing = _list_shards(source, content.shards, allow_outside)
    unreadable = (*content.failures(source), *listing.unreadable)
    return replace(listing, ignored=listing.ignored + content.ignored, unreadable=unreadable)


def _list_shards(source: Source, names: Sequence[str], allow_outside: bool) -> Listing:
    """List the images in .tar or .parquet files with these names, relative to the root of the source."""
    suffixes = {suffix_of(name) for name in names}
    if len(suffixes) > 1:
        message = f"found {' and '.join(sorted(suffixes))} files in {source.argument!r}, expected one kind"
        raise UsageError(message, hint="name one kind by a pattern such as 'data/train-{000..012}.tar'")
    if suffixes == {".tar"}:
        return list_tars(source, names)
    listing = list_parquet(source, names, allow_outside=allow_outside)
    return drop_incomplete(listing, "have neither label nor split")


def _not_data(argument: str, path: str) -> UsageError:
    exists = os.path.exists(path)
    return UsageError(
        f"{argument!r} {'is another kind of file' if exists else 'does not exist'}, expected a folder of images, "
        "a .csv, .tsv, .jsonl or .parquet table, .tar shards, a URL of one of them, or hf:NAME",
        hint="give the folder that holds it" if exists else "check the path",
    )


def _check_listings(listings: Sequence[Listing], split_by: str) -> None:
    """Raise UsageError unless each source has images, and all or none have labels and, unless split by hash, splits."""
    if not listings:
        raise UsageError("no data given", hint="give a folder of images or a table")
    for listing in listings:
        if not listing.rows:
            reasons = [*(failure.reason for failure in listing.unreadable[:1]), f"{listing.ignored} other files"]
            found = f"no image in {listing.source.argument!r} ({', '.join(reasons)})"
            hint = "put a folder of images for each class there, or give another path"
            raise UsageError(f"{found}, expected {' '.join(IMAGE_SUFFIXES)}", hint=hint)
    for field in ("label",) if split_by == "hash" else ("label", "split"):
        # a source has the field in each row or in none, so the first row is enough
        having = {bool(getattr(listing.rows[0], field)): listing.source.argument for listing in listings}
        if len(having) > 1:
            message = f"{having[True]!r} has {field}s, {having[False]!r} has none, expected all or none"
            hint = "extract them one by one" + (", or split by hash" if field == "split" else "")
            raise UsageError(message, hint=hint)
    for listing in listings if split_by in ("folder", "column") else ():
        source = listing.source
        has_columns = source.is_hub or (source.has_files and suffix_of(source.argument) != ".tar")
        if has_columns != (split_by == "column") or not listing.rows[0].split:
            hint = "expected the folders train/ val/ test/, or a table with a split column"
            raise UsageError(f"{listing.source.argument!r} has no splits by {split_by}", hint=hint)


def _task_of(listings: Sequence[Listing]) -> str:
    """Return the task of all labels, "single" without labels."""
    found = {row.task: listing.source.argument for listing in listings for row in listing.rows if row.label is not None}
    if len(found) > 1:
        (task, argument), (other_task, other) = list(found.items())[:2]
        message = f"{argument!r} has {task} labels, {other!r} {other_task}, expected one kind"
        raise UsageError(message, hint="extract them one by one")
    return next(iter(found), "single")


def _limited(rows: list[tuple[int, Row]], limit: int | None) -> list[tuple[int, Row]]:
    """Return `limit` rows, in turn from each class and named split, in their order: a larger limit adds rows."""
    seen: Counter[tuple[str, str | None]] = Counter()
    turns = []
    for order, (_, row) in enumerate(rows):
        turns.append((seen[row.split, row.label], order))
        seen[row.split, row.label] += 1
    return [rows[order] for order in sorted(order for _, order in sorted(turns)[:limit])]


def _read_keys(
    rows: Sequence[tuple[int, Row]], sources: Sequence[Source], key_of: Callable[[ByteSource], bytes]
) -> tuple[list[Sample], list[Failure]]:
    """Return a sample for each row whose image can be read, and a failure for each other, computed in threads."""

    def read_batch(batch: Sequence[tuple[int, Row]]) -> list[Sample | Failure]:
        return [_read_key(row, index, sources[index], key_of) for index, row in batch]

    places = [ByteSource(join(sources[index].root, row.path)) for index, row in (rows[0], rows[-1])]
    readers = REMOTE_READERS if any(place.is_remote for place in places) else READERS
    size = min(BATCH, -(-len(rows) // (4 * readers)))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    with ThreadPoolExecutor(readers, thread_name_prefix="key") as threads:
        results = [result for batch in threads.map(read_batch, batches) for result in batch]
    samples = [result for result in results if isinstance(result, Sample)]
    failures = [result for result in results if isinstance(result, Failure)]
    if not samples:
        message = f"no image can be read, first of {len(failures)}: {failures[0].path!r}: {failures[0].reason}"
        raise UsageError(message, hint="check paths and permissions; paths in a table are relative to its folder")
    return samples, failures


def _read_key(row: Row, index: int, source: Source, key_of: Callable[[ByteSource], bytes]) -> Sample | Failure:
    try:
        key = key_of(ByteSource(join(source.root, row.path), row.part))
        return Sample(row.path, row.label, row.split, row.group, key, index, row.part)
    except EmbedpipeError:
        raise  # it concerns all images, such as a missing library
    except OSError as exc:
        return Failure(source.display_name(row.path, row.part), "read", exc.strerror or str(exc))


def _contradictions(samples: Sequence[Sample]) -> list[str]:
    """Return a warning if samples with the same content have different labels."""
    first: dict[bytes, Sample] = {}
    pairs = {
        sample.key: (first[sample.key], sample)
        for sample in samples
        if sample.label is not None and first.setdefault(sample.key, sample).label != sample.label
    }
    if not pairs:
        return []
    left, right = next(iter(pairs.values()))
    where = left.path if left.path == right.path else f"{left.path} and {right.path}"
    return [f"{len(pairs)} image(s) with several labels, the first: {where}, {left.label} and {right.label}"]


def _name(sources: Sequence[Source]) -> str:
    """Return the name of a data set: that of its first source, and how many more there are."""
    first = os.path.basename(sources[0].root)
    if sources[0].has_files:
        first = os.path.splitext(sources[0].absolute.rpartition("/")[2])[0]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", first.removeprefix(HUB)).strip("-.") or "data"
    return name if len(sources) == 1 else f"{name}-and-{len(sources) - 1}-more"

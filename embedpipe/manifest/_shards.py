"""Shards: files that hold many images each, .tar or .parquet, alone or several as one source."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from embedpipe.errors import UsageError
from embedpipe.manifest._folder import are_splits, folder_row, keep_alike, split_of_names
from embedpipe.manifest._parquet import list_parquet
from embedpipe.manifest._sample import Failure, Listing, Row, name_of
from embedpipe.manifest._source import Source, join, suffix_of
from embedpipe.manifest._tar import Shard, read_tar

READERS = 8


def list_shards(source: Source, names: Sequence[str], *, allow_outside: bool) -> Listing:
    """Read .tar or .parquet files as one source.

    Parameters
    ----------
    names : sequence of str    their paths relative to the root of the source

    Raises
    ------
    UsageError      kinds that do not go together, or a table that contradicts itself
    StorageError    a Parquet file cannot be read
    """
    suffixes = {suffix_of(name) for name in names}
    if len(suffixes) > 1:
        raise UsageError(
            f"found {' and '.join(sorted(suffixes))} files in {source.argument!r}, expected one kind",
            hint="name one kind by a pattern such as 'data/train-{000..012}.tar'",
        )
    if suffixes == {".parquet"}:
        return keep_alike(list_parquet(source, names, allow_outside=allow_outside), "have neither label nor split")
    return _list_tars(source, names)


def _list_tars(source: Source, names: Sequence[str]) -> Listing:
    with ThreadPoolExecutor(READERS, thread_name_prefix="list") as threads:
        shards = list(threads.map(read_tar, [join(source.root, name) for name in names]))
    labelled = any(image.label for shard in shards for image in shard.images)
    folders = {image.name.split("/")[0] for shard in shards for image in shard.images if "/" in image.name}
    has_splits = not labelled and are_splits(folders, source.argument)
    named = split_of_names(names)
    rows = [row for name, shard in zip(names, shards, strict=True) for row in _rows(name, shard, has_splits, named)]
    flaws = [(name, shard.flaw) for name, shard in zip(names, shards, strict=True) if shard.flaw]
    listing = Listing(
        source=source,
        rows=tuple(rows),
        ignored=sum(shard.ignored for shard in shards),
        unreadable=tuple(Failure(name_of(source, Row(name)), "read", flaw) for name, flaw in flaws),
        warnings=tuple(
            f"{name_of(source, Row(name))}: {text}"
            for name, shard in zip(names, shards, strict=True)
            for text in shard.warnings
        ),
    )
    return keep_alike(listing, "have no label")


def _rows(path: str, shard: Shard, has_splits: bool, named: dict[str, str]) -> list[Row]:
    """Return a row for each image of a tar: what its sidecars say, else its folder."""
    rows = []
    for image in shard.images:
        row = folder_row(image.name, has_splits)
        rows.append(
            Row(
                path, image.label or row.label, row.split or named.get(path, ""), None, f"{image.location}/{image.name}"
            )
        )
    return rows

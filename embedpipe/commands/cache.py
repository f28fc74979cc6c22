"""cache ls, info, gc, rm and export: list, prune and export the feature cache.

>>> list_cache(cache_dir="cache").spaces[0].rows
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import CacheBusy, CacheMismatch, StorageError, UsageError
from embedpipe.storage import BYTES, PathLike, parse_amount

if TYPE_CHECKING:
    from embedpipe.cache import Cache

SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86400, "W": 604800}


@dataclass(frozen=True)
class SpaceRecord:
    """A space: its origin, size and last use; `damage` or `unsupported` says why it cannot be read."""

    space: str
    bytes: int
    last_used: str
    backbone: str | None = None
    layer: str | None = None
    rows: int | None = None
    failures: int | None = None
    pending_shards: int | None = None
    interrupted: bool | None = None
    damage: str | None = None
    unsupported: str | None = None


@dataclass(frozen=True)
class DatasetRecord:
    """A data set: its images, classes and sources; `damage` says why its table cannot be read."""

    dataset: str
    images: int | None = None
    classes: list[str] | None = None
    sources: list[str] | None = None
    damage: str | None = None


@dataclass(frozen=True)
class Listing:
    """The spaces and data sets of a cache."""

    spaces: list[SpaceRecord]
    datasets: list[DatasetRecord]
    bytes: int


@dataclass(frozen=True)
class Removal:
    """Removed items {name, bytes, reason}, skipped items {name, reason}, and the bytes that were freed and are left."""

    removed: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    freed_bytes: int
    left_bytes: int
    dry_run: bool


def list_cache(*, cache_dir: PathLike = "cache") -> Listing:
    """List spaces and data sets, with sizes and last use.

    Returns
    -------
    Listing
    """
    from embedpipe.cache import Cache, measure

    cache = Cache(Path(cache_dir))
    spaces = [_describe(cache, name) for name in cache.space_names()]
    return Listing(spaces, [_describe_dataset(cache, name) for name in cache.datasets()], measure(cache.root))


def _describe(cache: Cache, name: str) -> SpaceRecord:
    from embedpipe.cache import last_used, measure

    folder = cache.spaces_folder / name
    used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(last_used(folder)))
    record = SpaceRecord(name, measure(folder), used)
    try:
        space = cache.find_space(name)
        view = None if space.unsupported else space.view()
    except CacheMismatch as exc:
        return replace(record, damage=exc.message)
    return replace(
        record,
        backbone=f"{space.spec['source']}:{space.spec['architecture']}",
        layer=space.spec["layer"],
        rows=None if view is None else len(view),
        failures=None if view is None else len(view.failures),
        pending_shards=space.pending_shards,
        interrupted=space.interrupted,
        unsupported=space.unsupported,
    )


def _describe_dataset(cache: Cache, name: str) -> DatasetRecord:
    try:
        manifest = cache.read_dataset(name)
    except CacheMismatch as exc:
        return DatasetRecord(name, damage=exc.message)
    sources = [source.argument for source in manifest.sources]
    return DatasetRecord(name, len(manifest.samples), list(manifest.classes), sources)


def describe_space(space: str, *, cache_dir: PathLike = "cache") -> dict[str, Any]:
    """Describe a space: its spec, its environments, the pins of an interrupted extraction, its files.

    Parameters
    ----------
    space : str
        Name of the space, or a unique prefix.

    Raises
    ------
    UsageError       none or several match
    CacheMismatch    the space is damaged
    """
    from embedpipe.cache import Cache, measure

    cache = Cache(Path(cache_dir))
    found = cache.find_space(space)
    meta = found.meta
    assert meta is not None
    paths = [path for path in (found.features_path, *found.shard_paths()) if path.exists()]
    return {
        **asdict(_describe(cache, found.folder.name)),
        "fingerprint": found.fingerprint,
        "feature_dim": meta.feature_dim,
        "dtype": meta.dtype,
        "spec": meta.spec,
        "environments": list(meta.environments),
        "pins": meta.pins,
        "files": {str(path.relative_to(found.folder)): measure(path) for path in paths},
    }


def collect_garbage(
    *,
    max_size: str | None = None,
    older_than: str | None = None,
    unused: bool = False,
    dry_run: bool = False,
    cache_dir: PathLike = "cache",
) -> Removal:
    """Remove converted graphs, which only save time, and whole spaces, except those that are being written.

    Parameters
    ----------
    max_size : str
        Remove the least recently used until the cache is at most this large, such as 10GB or 500MiB.
    older_than : str
        Remove those not used for this long, such as 30d, 12h or 2w.
    unused : bool
        Remove spaces without rows of any data set, all graphs, and temporary files of killed processes older than an hour.
    dry_run : bool
        Only report what would be removed.

    Raises
    ------
    UsageError       no option, or an invalid size or time
    CacheMismatch    --unused with a damaged data set, whose rows are unknown
    """
    from embedpipe.cache import Cache, last_used, measure, sweep_leftovers

    if max_size is None and older_than is None and not unused:
        raise UsageError("gc has no criterion", hint="give --max-size, --older-than or --unused")
    limit = float("inf") if max_size is None else parse_amount(max_size, BYTES, "--max-size", "10GB")
    oldest = 0.0 if older_than is None else time.time() - parse_amount(older_than, SECONDS, "--older-than", "30d")
    cache = Cache(Path(cache_dir))
    size_before, unused_spaces = measure(cache.root), _find_unused(cache) if unused else {}
    leftovers = sweep_leftovers(cache.root, dry_run=dry_run) if unused else {}
    removed: list[dict[str, Any]] = [
        {"name": name, "bytes": size, "reason": "temporary file of a killed process"}
        for name, size in leftovers.items()
    ]
    for path, why in _old_graphs(cache, size_before - limit, oldest, unused=unused):
        removed.append({"name": path.name, "bytes": measure(path), "reason": why})
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    skipped, freed = [], sum(one["bytes"] for one in removed)
    for used, name in sorted((last_used(cache.spaces_folder / name), name) for name in cache.space_names()):
        reason = unused_spaces.get(name) or (f"not used for {older_than}" if used < oldest else None)
        reason = reason or (f"the cache is over {max_size}" if size_before - freed > limit else None)
        if reason:
            size = measure(cache.spaces_folder / name)
            try:
                cache.remove_space(name, dry_run=dry_run)
            except (CacheBusy, StorageError) as exc:
                skipped.append({"name": name, "reason": exc.message})
            else:
                removed.append({"name": name, "bytes": size, "reason": reason})
                freed += size
    return Removal(removed, skipped, freed, size_before - freed, dry_run)


def _old_graphs(cache: Cache, excess: float, oldest: float, *, unused: bool) -> Iterator[tuple[Path, str]]:
    """Yield converted graphs to remove and the reason, the oldest first, until `excess` bytes are removed."""
    from embedpipe.cache import measure

    for path in sorted(cache.graphs_folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime):
        if unused or path.stat().st_mtime < oldest or excess > 0:
            excess -= measure(path)
            yield path, "the graph is converted again when needed"


def _find_unused(cache: Cache) -> dict[str, str]:
    """Return the spaces without a row or failure of any data set, and unsupported ones, with the reason.

    A damaged sample table raises an error, because it might name the rows.
    """
    named = {sample.key for name in cache.datasets() for sample in cache.read_dataset(name).samples}
    found = {}
    for name in cache.space_names():
        try:
            space = cache.find_space(name)
            if space.unsupported:
                found[name] = space.unsupported
                continue
            view = space.view()
        except CacheMismatch:
            continue  # the content of a damaged space is unknown
        if named.isdisjoint({*map(bytes, view.keys), *view.failures}):
            found[name] = "no data set has rows in this space"
    return found


def remove_from_cache(names: Sequence[str], *, cache_dir: PathLike = "cache") -> Removal:
    """Remove spaces and data sets by name; image files are never touched.

    Parameters
    ----------
    names : sequence of str
        Names or unique prefixes of spaces and data sets.

    Raises
    ------
    UsageError    an unknown name; nothing is removed
    CacheBusy     a space is being written
    """
    from embedpipe.cache import Cache, measure

    cache = Cache(Path(cache_dir))
    chosen = list(dict.fromkeys(cache.find(name) for name in names))
    removed: list[dict[str, Any]] = []
    for name in chosen:
        is_space, reason = name in cache.space_names(), "named"
        size = measure(cache.spaces_folder / name if is_space else cache.table_path(name))
        if is_space:
            with suppress(CacheMismatch):
                reason = cache.find_space(name).unsupported or reason
            cache.remove_space(name)
        else:
            cache.remove_dataset(name)
        removed.append({"name": name, "bytes": size, "reason": reason})
    return Removal(removed, [], sum(item["bytes"] for item in removed), measure(cache.root), False)


def export_features(
    dataset: str | None = None,
    *,
    format: Literal["h5", "npy", "parquet"] = "h5",
    out: str | None = None,
    space: str | None = None,
    backbone: str | None = None,
    layer: str | None = None,
    cache_dir: PathLike = "cache",
) -> dict[str, Any]:
    """Write features, labels, paths, splits, classes and keys of a data set into one file for other programs.

    Parameters
    ----------
    dataset : str
        Name, id or source of a data set. Default: the one that was extracted last.
    format : str
        h5 (plain HDF5), npy (one .npz, no pickle) or parquet.
    out : str
        Output file, written atomically. Default: the name of the data set in the current folder.
    space : str
        Space to export: name or unique prefix.
    backbone : str
        Export the space of this backbone.
    layer : str
        Export the space of this layer.

    Raises
    ------
    UsageError      no such features, or an ambiguous choice; parquet without pyarrow
    StorageError    the file cannot be written
    """
    from embedpipe.cache import Cache, Exported, export_writer
    from embedpipe.features import open_features
    from embedpipe.provenance import canonical_json
    from embedpipe.storage import write_atomic

    features = open_features(Cache(Path(cache_dir)), dataset, space=space, backbone=backbone, layer=layer)
    samples = features.samples()
    if not samples:
        raise UsageError(f"{features.manifest.name} has no rows in {features.space.folder.name}")
    origin = {"dataset": features.dataset, "space": features.space.folder.name}
    about = {**origin, "fingerprint": features.space.fingerprint, "spec": canonical_json(features.space.spec)}
    path = Path(out or f"{features.dataset}.{'npz' if format == 'npy' else format}")
    write_atomic(path, export_writer(format, Exported(features.manifest, samples, features.space.view()), about))
    return {
        "path": str(path),
        "format": format,
        **origin,
        "rows": len(samples),
        "feature_dim": features.feature_dim,
        "bytes": path.stat().st_size,
    }

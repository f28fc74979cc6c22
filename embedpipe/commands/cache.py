"""Caring for a cache: what is there, what may go, and leaving with it.

>>> list_cache(cache_dir="cache").spaces[0].rows
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import CacheBusy, CacheMismatch, StorageError, UsageError
from embedpipe.storage import BYTES, PathLike, parse_amount

if TYPE_CHECKING:
    from embedpipe.cache import Cache

SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86400, "W": 604800}


@dataclass(frozen=True)
class SpaceRecord:
    """One space: what made it, how large it is, when it was used last; `damage` or `unsupported` says why it cannot be read."""

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
    """One data set: its images, classes and sources; `damage` where its table cannot be read."""

    dataset: str
    images: int | None = None
    classes: list[str] | None = None
    sources: list[str] | None = None
    damage: str | None = None


@dataclass(frozen=True)
class Listing:
    """All that a cache holds."""

    spaces: list[SpaceRecord]
    datasets: list[DatasetRecord]
    bytes: int


@dataclass(frozen=True)
class Collected:
    """What was removed ({name, bytes, reason} each), what could not be ({name, reason}), and the bytes before and after."""

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
    try:
        space = cache.find_space(name)
        view = None if space.unsupported else space.view()
    except CacheMismatch as exc:
        return SpaceRecord(name, measure(folder), used, damage=exc.message)
    return SpaceRecord(
        space=name,
        bytes=measure(folder),
        last_used=used,
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
    """Tell all about one space: its spec, the environments that made it, the pins of an interrupted extraction, its files.

    Parameters
    ----------
    space : str
        Its name, or a beginning of it.

    Raises
    ------
    UsageError       none or several begin so
    CacheMismatch    it is damaged
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
) -> Collected:
    """Remove graphs that executors keep, which only save time, and whole spaces, never one that a writer holds.

    Parameters
    ----------
    max_size : str
        Remove the least recently used until the cache is at most this large, such as 10GB or 500MiB.
    older_than : str
        Remove those not used for this long, such as 30d, 12h or 2w.
    unused : bool
        Remove those in which no data set has a row, all graphs, and temporary files that killed processes left an hour ago
        or longer.
    dry_run : bool
        Only say what would go.

    Raises
    ------
    UsageError       nothing asked for, or no such size or time
    CacheMismatch    --unused with a damaged data set: what it names is not known
    """
    from embedpipe.cache import Cache, last_used, measure, sweep_leftovers

    if max_size is None and older_than is None and not unused:
        raise UsageError("nothing to collect", hint="give --max-size, --older-than or --unused")
    limit = float("inf") if max_size is None else parse_amount(max_size, BYTES, "--max-size", "10GB")
    oldest = 0.0 if older_than is None else time.time() - parse_amount(older_than, SECONDS, "--older-than", "30d")
    cache = Cache(Path(cache_dir))
    left, idle = measure(cache.root), _unused(cache) if unused else {}
    swept = sweep_leftovers(cache.root, dry_run=dry_run) if unused else {}
    removed: list[dict[str, Any]] = [
        {"name": name, "bytes": size, "reason": "left by a killed process"} for name, size in swept.items()
    ]
    for path, why in _idle_graphs(cache, left - limit, oldest, unused=unused):
        removed.append({"name": path.name, "bytes": measure(path), "reason": why})
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    skipped, freed = [], sum(one["bytes"] for one in removed)
    for used, name in sorted((last_used(cache.spaces_folder / name), name) for name in cache.space_names()):
        reason = idle.get(name) or (f"not used for {older_than}" if used < oldest else None)
        reason = reason or (f"the cache is over {max_size}" if left - freed > limit else None)
        if reason:
            size = measure(cache.spaces_folder / name)
            try:
                cache.remove_space(name, dry_run=dry_run)
            except (CacheBusy, StorageError) as exc:
                skipped.append({"name": name, "reason": exc.message})
            else:
                removed.append({"name": name, "bytes": size, "reason": reason})
                freed += size
    return Collected(removed, skipped, freed, left - freed, dry_run)


def _idle_graphs(cache: Cache, excess: float, oldest: float, *, unused: bool) -> Iterator[tuple[Path, str]]:
    """Yield kept graphs to remove and why, the oldest first, until `excess` bytes are gone."""
    from embedpipe.cache import measure

    for path in sorted(cache.graphs_folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime):
        if unused or path.stat().st_mtime < oldest or excess > 0:
            excess -= measure(path)
            yield path, "a graph is converted again when it is needed"


def _unused(cache: Cache) -> dict[str, str]:
    """Return the spaces in which no data set has a row or a failure, or that cannot be read any more, and why.

    A damaged table is an error, for it might name their rows.
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
            continue  # what a damaged space holds is not known
        if named.isdisjoint({*map(bytes, view.keys), *view.failures}):
            found[name] = "no data set has rows in it"
    return found


def remove_from_cache(names: Sequence[str], *, cache_dir: PathLike = "cache") -> Collected:
    """Remove spaces and sample tables by name; image files are never touched.

    Parameters
    ----------
    names : sequence of str
        Spaces and data sets: names, or beginnings of them.

    Raises
    ------
    UsageError    a name that is not there: nothing is removed
    CacheBusy     a writer holds the space
    """
    from embedpipe.cache import Cache, measure

    cache = Cache(Path(cache_dir))
    chosen = list(dict.fromkeys(cache.find(name) for name in names))
    removed, freed = [], 0
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
        freed += size
    return Collected(removed, [], freed, measure(cache.root), False)


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
    """Write features, labels, paths, splits, classes and keys of a data set into one file that needs no embedpipe.

    Parameters
    ----------
    dataset : str
        Name, id or source of a data set. Default: the one extracted last.
    format : str
        h5 (plain HDF5), npy (one .npz, no pickle) or parquet.
    out : str
        The file to write, whole or not at all. Default: the data set's name in the present folder.
    space : str
        Which space, by name or a beginning of it.
    backbone : str
        Which space, by its backbone.
    layer : str
        Which space, by its layer.

    Raises
    ------
    UsageError      no such features, or several; parquet without pyarrow
    StorageError    the file cannot be written
    """
    from embedpipe.cache import Cache, Exported, writer_of
    from embedpipe.features import open_features
    from embedpipe.provenance import canonical_json
    from embedpipe.storage import publish

    features = open_features(Cache(Path(cache_dir)), dataset, space=space, backbone=backbone, layer=layer)
    samples = features.samples()
    if not samples:
        raise UsageError(f"{features.manifest.name} has no rows in {features.space.folder.name}")
    told = {"dataset": features.dataset, "space": features.space.folder.name}
    about = {**told, "fingerprint": features.space.fingerprint, "spec": canonical_json(features.space.spec)}
    path = Path(out or f"{features.dataset}.{'npz' if format == 'npy' else format}")
    publish(path, writer_of(format, Exported(features.manifest, samples, features.space.view()), about))
    return {
        "path": str(path),
        "format": format,
        **told,
        "rows": len(samples),
        "feature_dim": features.feature_dim,
        "bytes": path.stat().st_size,
    }

"""Proving and caring for a cache: what is there, why it is (not) reused, is it true, what may go, and leaving with it.

>>> list_cache(cache_dir="cache").spaces[0].rows
>>> verify_cache(cache_dir="cache").damaged
False
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import CacheBusy, CacheMismatch, EmbedpipeError, StorageError, UsageError
from embedpipe.provenance import Difference, differing_fields

if TYPE_CHECKING:
    from embedpipe.cache import Cache, Finding, Space
    from embedpipe.manifest import Manifest
    from embedpipe.pipeline import Progress, Rows

PathLike = str | os.PathLike[str]
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86400, "W": 604800}
# One machine under the same pins gives the same bits. Other batch sizes, executors and devices differ by about 1e-6 of a row's
# norm, other decoders and resize filters by 1e-3 and more: the limits lie between, so that they tell a false row from noise.
MAX_COSINE, MAX_RELATIVE = 1e-4, 1e-3


@dataclass(frozen=True)
class SpaceRecord:
    """One space: what made it, how large it is, when it was used last; `damage` where it cannot be read."""

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
class Explanation:
    """What an extraction would find, and how the nearest other space differs from the one that it wants.

    hits, misses, failures : int    images with a row, without one, and recorded as failures
    nearest : str                   the space with the fewest differing fields, then the most hits; None: no miss, or no other
    """

    dataset: str
    space: str
    exists: bool
    images: int
    hits: int
    misses: int
    failures: int
    nearest: str | None
    nearest_hits: int
    differing: list[Difference]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "differing": [one._asdict() for one in self.differing]}


@dataclass(frozen=True)
class Recomputed:
    """Rows of one space computed again: how many, and the largest differences from what is stored."""

    space: str
    rows: int
    recomputed: int = 0
    max_cosine_distance: float = 0.0
    max_relative_difference: float = 0.0


@dataclass(frozen=True)
class Verification:
    """All that verifying found."""

    findings: list[Finding]
    spaces: list[Recomputed]
    files: int

    @property
    def damage(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == "damage"]

    @property
    def damaged(self) -> bool:
        return bool(self.damage)


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
        view = space.view()
    except CacheMismatch as exc:
        return SpaceRecord(name, measure(folder), used, damage=exc.message)
    return SpaceRecord(
        space=name,
        bytes=measure(folder),
        last_used=used,
        backbone=f"{space.spec['source']}:{space.spec['architecture']}",
        layer=space.spec["layer"],
        rows=len(view),
        failures=len(view.failures),
        pending_shards=space.pending_shards,
        interrupted=space.interrupted,
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


def explain_reuse(
    dataset: str | None = None,
    backbone: str = "timm:resnet18",
    *,
    weights: str = "pretrained",
    layer: str | None = None,
    pool: Literal["auto", "avg", "cls", "max", "none"] = "auto",
    image_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    store_dtype: Literal["float32", "float16"] = "float32",
    allow_outside: bool = False,
    cache_dir: PathLike = "cache",
    seed: int = 0,
) -> Explanation:
    """Say what an extraction would reuse, and how the nearest space differs where it would compute; computes nothing.

    Parameters
    ----------
    dataset : str
        Folder or table of images as `extract` takes it, or a data set of the cache. Default: the one extracted last.
    backbone : str
        timm:NAME, torchvision:NAME, or the model/ folder of a fine-tuned run.
    weights : str
        As in `extract`.
    layer : str
        As in `extract`.
    pool : str
        As in `extract`.
    image_size : int
        As in `extract`.
    crop_pct : float
        As in `extract`.
    interpolation : str
        As in `extract`.
    precision : str
        As in `extract`.
    store_dtype : str
        As in `extract`.
    allow_outside : bool
        Let a table name files outside its own folder.

    Raises
    ------
    UsageError    the data, a name or an option is wrong
    """
    from embedpipe.backbones import load_backbone
    from embedpipe.cache import Cache, dataset_name
    from embedpipe.pipeline import space_name, space_spec

    cache = Cache(Path(cache_dir))
    manifest = _wanted_data(cache, dataset, allow_outside)
    shape = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
    loaded = load_backbone(backbone, weights=weights, layer=layer, pool=pool, seed=seed, **shape)  # type: ignore[arg-type]
    spec = space_spec(loaded, precision, store_dtype)
    space = cache.open_space(spec, name=space_name(spec))
    keys, view = {sample.key for sample in manifest.samples}, space.view()
    hits, failures = sum(key in view for key in keys), sum(key in view.failures for key in keys)
    misses = len(keys) - hits - failures
    near = _nearest(cache, space, keys) if misses else (None, 0, [])
    name, exists = space.folder.name, space.meta is not None
    return Explanation(dataset_name(manifest), name, exists, len(keys), hits, misses, failures, *near)


def _wanted_data(cache: Cache, dataset: str | None, allow_outside: bool) -> Manifest:
    """Return the manifest of a source as it is now, or of a data set of the cache."""
    from embedpipe.cache import KeyIndex
    from embedpipe.manifest import read_manifest

    if dataset is None or not Path(dataset).exists():
        return cache.read_dataset(dataset)
    index = KeyIndex()
    try:
        return read_manifest([dataset], key_of=index.key_of, allow_outside=allow_outside)
    finally:
        index.close()


def _nearest(cache: Cache, wanted: Space, keys: set[bytes]) -> tuple[str | None, int, list[Difference]]:
    """Return the other space with the fewest differing fields, then the most hits, with both."""
    found: list[tuple[str | None, int, list[Difference]]] = [
        (space.folder.name, sum(key in view for key in keys), differing_fields(space.spec, wanted.spec))
        for space in cache.spaces()
        if space.folder != wanted.folder and (view := space.view()) is not None
    ]
    return min(found, key=lambda one: (len(one[2]), -one[1], one[0]), default=(None, 0, []))


def verify_cache(
    names: Sequence[str] = (),
    *,
    sample: int = 8,
    all: bool = False,
    device: str = "auto",
    cache_dir: PathLike = "cache",
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Prove every byte of the cache, the keys against the image files, and rows by computing them again.

    Parameters
    ----------
    names : sequence of str
        Data sets and spaces; default: all.
    sample : int
        Rows of each space to compute again, chosen by --seed; 0: none.
    all : bool
        Compute all rows again.
    device : str
        auto, cpu, cuda, cuda:K or mps.

    Returns
    -------
    Verification
        `damaged` says whether anything is wrong with the cache itself.

    Raises
    ------
    UsageError    a name that is not there
    """
    from embedpipe.cache import DAMAGE, Cache, Finding, prove_files, prove_latest, prove_space

    cache = Cache(Path(cache_dir))
    spaces, datasets = _chosen(cache, names)
    findings = [] if names else list(prove_latest(cache))
    tables: dict[str, Manifest] = {}
    for name in cache.datasets():
        try:
            tables[name] = cache.read_dataset(name)
        except CacheMismatch as exc:
            findings += [Finding(DAMAGE, str(cache.table_path(name)), exc.message)] if name in datasets else []
    proved = {name: prove_files(tables[name]) for name in tables if name in datasets}
    findings += [finding for _, found in proved.values() for finding in found]
    files = {s.key: m.file_of(s) for m in tables.values() for s in m.samples}
    for known, _ in proved.values():
        files |= known
    recomputed = []
    for name in spaces:
        damage = list(prove_space(cache, name))
        findings += damage
        if not damage:
            space = cache.find_space(name)
            findings += _coverage(space, tables, datasets, whole=len(tables) == len(cache.datasets()))
            count = None if all else sample
            done, found = _recompute(space, files, count, device=device, seed=seed, progress=progress)
            recomputed.append(done)
            findings += found
    return Verification(findings, recomputed, sum(len(known) for known, _ in proved.values()))


def _chosen(cache: Cache, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the spaces and the data sets that `names` mean, all of both when there are none."""
    spaces, datasets = cache.space_names(), cache.datasets()
    if not names:
        return spaces, datasets
    found = [_find(cache, name) for name in names]
    return [name for name in found if name in spaces], [name for name in found if name in datasets]


def _find(cache: Cache, text: str) -> str:
    """Return the space or data set that `text` means: a name, an id, a beginning, or the source of a data set."""
    from embedpipe.cache import pick

    names = [*cache.space_names(), *cache.datasets()]
    if not any(name.startswith(text) for name in names):
        try:
            return cache.find_dataset(text)
        except UsageError:
            pass
    return pick(text, names, "space or data set")


def _coverage(
    space: Space, tables: Mapping[str, Manifest], datasets: Sequence[str], *, whole: bool
) -> Iterator[Finding]:
    """Yield samples without row or failure, where a data set has rows in the space, and rows that no data set names."""
    from embedpipe.cache import Finding

    view = space.view()
    named: set[bytes] = set()
    for name, manifest in tables.items():
        keys = {sample.key for sample in manifest.samples}
        named |= keys
        absent = sum(key not in view and key not in view.failures for key in keys)
        if name in datasets and 0 < absent < len(keys):
            yield Finding(
                "missing", space.folder.name, f"{absent} images of {name} have no row and no recorded failure"
            )
    orphaned = sum(key.tobytes() not in named for key in view.keys)
    if orphaned and whole:
        yield Finding("orphaned", space.folder.name, f"{orphaned} rows are named by no data set")


def _recompute(
    space: Space,
    files: Mapping[bytes, Path],
    count: int | None,
    *,
    device: str,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Recomputed, list[Finding]]:
    """Compute rows again with the recorded loader, under the recorded pins, and compare."""
    from embedpipe.cache import Finding
    from embedpipe.classifier import Reference
    from embedpipe.pipeline import plan_forward, stream_rows

    view, name = space.view(), space.folder.name
    known = sorted(key for key in files if key in view)
    chosen = known if count is None else sorted(random.Random(seed).sample(known, min(count, len(known))))
    none = Recomputed(name, len(view))
    if not chosen:
        return none, []
    try:
        backbone = Reference(space.spec, space.loader).load()
    except EmbedpipeError as exc:
        return none, [Finding("unproved", name, f"no row can be computed again: {exc.message}")]
    arithmetic = {"precision": space.spec["precision"], "store_dtype": space.spec["stored_dtype"]}
    forward = plan_forward(device=device, batch_size="auto", workers="auto", **arithmetic)
    pins = space.environments[-1].get("pins") or (space.meta and space.meta.pins)
    forward = forward.pinned(pins) if pins else forward
    done, cosine, relative, findings = 0, 0.0, 0.0, []
    for rows in stream_rows([(key, files[key]) for key in chosen], backbone, forward):
        far, near = _compare(space, rows, view.read(rows.keys))
        findings += far
        cosine, relative = max(cosine, near[0]), max(relative, near[1])
        done += len(rows)
        if progress:
            progress(f"verify {name}", done, len(chosen))
    return Recomputed(name, len(view), done, cosine, relative), findings


def _compare(space: Space, rows: Rows, stored: Any) -> tuple[list[Finding], tuple[float, float]]:
    """Return the rows that cannot be reproduced, and the largest cosine distance and relative difference."""
    import numpy as np

    from embedpipe.cache import DAMAGE, Finding

    old, new = stored.astype(np.float64), rows.features.astype(np.float64)
    norms = np.linalg.norm(old, axis=1), np.linalg.norm(new, axis=1)
    product = np.maximum(norms[0] * norms[1], np.finfo(np.float64).tiny)
    cosine = np.where((old == new).all(axis=1), 0.0, np.maximum(0, 1 - (old * new).sum(axis=1) / product))
    relative = np.linalg.norm(old - new, axis=1) / np.maximum(norms[0], np.finfo(np.float32).tiny)
    findings = [
        Finding(
            DAMAGE,
            space.folder.name,
            f"the row of {rows.keys[k].hex()[:12]} is not what its image gives: cosine distance {cosine[k]:.1e}, "
            f"{relative[k]:.1e} of its norm, expected at most {MAX_COSINE:.0e} and {MAX_RELATIVE:.0e}",
        )
        for k in np.flatnonzero((cosine > MAX_COSINE) | (relative > MAX_RELATIVE)).tolist()
    ]
    for key, stage, reason in rows.failures:
        kind = "unproved" if stage == "read" else DAMAGE
        findings.append(
            Finding(kind, space.folder.name, f"the row of {key.hex()[:12]} cannot be computed again: {reason}")
        )
    return findings, (float(cosine.max(initial=0)), float(relative.max(initial=0)))


def collect_garbage(
    *,
    max_size: str | None = None,
    older_than: str | None = None,
    unused: bool = False,
    dry_run: bool = False,
    cache_dir: PathLike = "cache",
) -> Collected:
    """Remove whole spaces, never one that a writer holds.

    Parameters
    ----------
    max_size : str
        Remove the least recently used until the cache is at most this large, such as 10GB or 500MiB.
    older_than : str
        Remove those not used for this long, such as 30d, 12h or 2w.
    unused : bool
        Remove those in which no data set has a row, and temporary files that killed processes left an hour ago or longer.
    dry_run : bool
        Only say what would go.

    Raises
    ------
    UsageError       nothing asked for, or no such size or time
    CacheMismatch    --unused with a damaged data set: what it names is not known
    """
    from embedpipe.cache import Cache, last_used, leftovers, measure, remove_leftover

    if max_size is None and older_than is None and not unused:
        raise UsageError("nothing to collect", hint="give --max-size, --older-than or --unused")
    cache = Cache(Path(cache_dir))
    limit = None if max_size is None else _amount(max_size, BYTES, "--max-size", "10GB")
    oldest = 0.0 if older_than is None else time.time() - _amount(older_than, SECONDS, "--older-than", "30d")
    left, freed = measure(cache.root), 0
    removed: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    idle = _unused(cache) if unused else {}
    for path in leftovers([cache.root, cache.spaces_folder, cache.datasets_folder]) if unused else []:
        removed.append({"name": path.name, "bytes": measure(path), "reason": "left by a killed process"})
        if not dry_run:
            remove_leftover(path)
        freed += removed[-1]["bytes"]
    for used, name in sorted((last_used(cache.spaces_folder / name), name) for name in cache.space_names()):
        reason = idle.get(name) or (f"not used for {older_than}" if used < oldest else None)
        reason = reason or (f"the cache is over {max_size}" if limit is not None and left - freed > limit else None)
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


def _amount(text: str, units: Mapping[str, int], flag: str, example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else "?"
    if match is None or unit not in units:
        raise UsageError(f"{flag}: found {text!r}; expected a number and a unit such as {example}")
    return float(match[1]) * units[unit]


def _unused(cache: Cache) -> dict[str, str]:
    """Return the spaces in which no data set has a row or a failure; a damaged table is an error, for it might name them."""
    named = {sample.key for name in cache.datasets() for sample in cache.read_dataset(name).samples}
    found = {}
    for name in cache.space_names():
        try:
            view = cache.find_space(name).view()
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
    chosen = list(dict.fromkeys(_find(cache, name) for name in names))
    removed, freed = [], 0
    for name in chosen:
        is_space = name in cache.space_names()
        size = measure(cache.spaces_folder / name if is_space else cache.table_path(name))
        if is_space:
            cache.remove_space(name)
        else:
            cache.remove_dataset(name)
        removed.append({"name": name, "bytes": size, "reason": "named"})
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
    from embedpipe.disk import publish
    from embedpipe.features import open_features
    from embedpipe.provenance import canonical_json

    features = open_features(Cache(Path(cache_dir)), dataset, space=space, backbone=backbone, layer=layer)
    samples = features.samples()
    if not samples:
        raise UsageError(f"{features.manifest.name} has no rows in {features.space.folder.name}")
    about = {
        "dataset": features.dataset,
        "space": features.space.folder.name,
        "fingerprint": features.space.fingerprint,
    }
    about["spec"] = canonical_json(features.space.spec)
    path = Path(out or f"{features.dataset}.{'npz' if format == 'npy' else format}")
    publish(path, writer_of(format, Exported(features.manifest, samples, features.space.view()), about))
    return {
        "path": str(path),
        "format": format,
        "dataset": features.dataset,
        "space": features.space.folder.name,
        "rows": len(samples),
        "feature_dim": features.feature_dim,
        "bytes": path.stat().st_size,
    }

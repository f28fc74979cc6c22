"""cache why and cache verify: why features are (not) reused, and whether the cache is undamaged.

>>> verify_cache(cache_dir="cache").damaged
False
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import CacheMismatch, EmbedpipeError, UsageError, check_pixels_option
from embedpipe.provenance import Difference, differing_fields, environment
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.cache import Cache, Finding, Space
    from embedpipe.data import ByteSource, Manifest
    from embedpipe.inference import Progress, Rows


@dataclass(frozen=True)
class Explanation:
    """What an extraction would reuse, and how the nearest other space differs from the requested one.

    hits, misses, failures : int    images with a row, without one, and recorded as failures
    nearest : str or None           space with the fewest differing fields (ties: the most hits), if there are misses
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
    """Recomputed rows of a space: their number, and the largest difference relative to the norm of a row."""

    space: str
    rows: int
    recomputed: int = 0
    max_relative_difference: float = 0.0


@dataclass(frozen=True)
class Verification:
    """The findings of `verify_cache`."""

    findings: list[Finding]
    spaces: list[Recomputed]
    files: int

    @property
    def damage(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == "damage"]

    @property
    def damaged(self) -> bool:
        return bool(self.damage)


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
    pixels: Literal["exact", "fast"] | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    store_dtype: Literal["float32", "float16"] = "float32",
    allow_outside: bool = False,
    cache_dir: PathLike = "cache",
    seed: int = 0,
) -> Explanation:
    """Report what an extraction would reuse, and how the nearest space differs otherwise; nothing is computed.

    Parameters
    ----------
    dataset : str
        Images as for `extract`, or a data set of the cache. Default: the one that was extracted last.
    backbone : str
        timm:NAME, torchvision:NAME, or the model/ folder of a fine-tuned run.
    weights, layer, pool, image_size, crop_pct, interpolation, precision, store_dtype : as extract takes them
        As in `extract`.
    pixels : str
        No longer used: images are always resized exactly.
    allow_outside : bool
        Allow a table to name files outside its own folder.

    Raises
    ------
    UsageError    the data, a name or an option is wrong
    """
    from embedpipe.backbones import load_backbone
    from embedpipe.cache import Cache, dataset_name
    from embedpipe.inference import space_spec

    check_pixels_option(pixels)
    cache = Cache(Path(cache_dir))
    manifest = _read_data(cache, dataset, allow_outside)
    shape: dict[str, Any] = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
    loaded = load_backbone(backbone, weights=weights, layer=layer, pool=pool, seed=seed, **shape)
    spec = space_spec(loaded, precision, store_dtype)
    space = cache.open_space(spec)
    keys, view = {sample.key for sample in manifest.samples}, space.view()
    hits, failures = sum(key in view for key in keys), sum(key in view.failures for key in keys)
    misses = len(keys) - hits - failures
    near = _nearest(cache, space, keys) if misses else (None, 0, [])
    name, exists = space.folder.name, space.meta is not None
    return Explanation(dataset_name(manifest), name, exists, len(keys), hits, misses, failures, *near)


def _read_data(cache: Cache, dataset: str | None, allow_outside: bool) -> Manifest:
    """Return the current manifest of a source, or that of a data set of the cache."""
    from embedpipe.cache import KeyIndex
    from embedpipe.data import is_data_argument, read_manifest

    if dataset is None or not is_data_argument(dataset):
        return cache.read_dataset(dataset)
    with closing(KeyIndex()) as index:
        return read_manifest(dataset, key_of=index.key_of, allow_outside=allow_outside)


def _nearest(cache: Cache, requested: Space, keys: set[bytes]) -> tuple[str | None, int, list[Difference]]:
    """Return the other space with the fewest differing fields (ties: the most hits), its hits and the differing fields."""
    found: list[tuple[str | None, int, list[Difference]]] = [
        (space.folder.name, sum(key in view for key in keys), differing_fields(space.spec, requested.spec))
        for space in cache.spaces()
        if space.folder != requested.folder and (view := space.view()) is not None
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
    """Check every byte of the cache against its digest, keys against image files, and recompute some rows.

    Parameters
    ----------
    names : sequence of str
        Data sets and spaces; default: all.
    sample : int
        Rows of each space to recompute, drawn with --seed; 0: none.
    all : bool
        Recompute all rows.
    device : str
        auto, cpu, cuda, cuda:K or mps.

    Returns
    -------
    Verification
        `damaged` is True if the cache itself is damaged.

    Raises
    ------
    UsageError    an unknown name or a missing device
    """
    from embedpipe.cache import DAMAGE, Cache, Finding, verify_files, verify_latest, verify_space

    if sample < 0:
        raise UsageError(f"--sample is {sample}, expected 0 or more")
    cache = Cache(Path(cache_dir))
    spaces, datasets = _select(cache, names)
    findings = [] if names else list(verify_latest(cache))
    tables: dict[str, Manifest] = {}
    for name in cache.datasets():
        try:
            tables[name] = cache.read_dataset(name)
        except CacheMismatch as exc:
            findings += [Finding(DAMAGE, str(cache.table_path(name)), exc.message)] if name in datasets else []
    proved = {name: verify_files(tables[name]) for name in tables if name in datasets}
    findings += [finding for _, found in proved.values() for finding in found]
    files = {s.key: m.byte_source_of(s) for name, m in tables.items() if name not in proved for s in m.samples}
    for known, _ in proved.values():
        files |= known
    recomputed = []
    for name in spaces:
        damage = list(verify_space(cache, name))
        findings += damage
        if not damage:
            space = cache.find_space(name)
            findings += _coverage(space, tables, datasets, whole=len(tables) == len(cache.datasets()))
            count = None if all else sample
            done, found = _recompute(space, files, count, device=device, seed=seed, progress=progress)
            recomputed.append(done)
            findings += found
    return Verification(findings, recomputed, sum(len(known) for known, _ in proved.values()))


def _select(cache: Cache, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the spaces and data sets that `names` refer to; all of them if there are no names."""
    spaces, datasets = cache.space_names(), cache.datasets()
    found = [cache.find(name) for name in names] or [*spaces, *datasets]
    return [name for name in found if name in spaces], [name for name in found if name in datasets]


def _coverage(
    space: Space, tables: Mapping[str, Manifest], datasets: Sequence[str], *, whole: bool
) -> Iterator[Finding]:
    """Yield samples without a row or failure in a space with other rows of their data set, and rows of no data set."""
    from embedpipe.cache import Finding

    view = space.view()
    named: set[bytes] = set()
    for name, manifest in tables.items():
        keys = {sample.key for sample in manifest.samples}
        named |= keys
        absent = sum(key not in view and key not in view.failures for key in keys)
        if name in datasets and 0 < absent < len(keys):
            detail = f"{absent} images of {name} have no row and no recorded failure"
            yield Finding("missing", space.folder.name, detail)
    orphaned = sum(key.tobytes() not in named for key in view.keys)
    if orphaned and whole:
        yield Finding("orphaned", space.folder.name, f"{orphaned} rows belong to no data set")


def _recompute(
    space: Space,
    files: Mapping[bytes, ByteSource],
    count: int | None,
    *,
    device: str,
    seed: int,
    progress: Progress | None,
) -> tuple[Recomputed, list[Finding]]:
    """Recompute rows with the recorded loader and pins, and compare them with the stored ones."""
    from embedpipe.cache import Finding
    from embedpipe.classifier import Reference
    from embedpipe.inference import Runner, resolve_settings, row_distances, stream_rows

    view, name = space.view(), space.folder.name
    known = sorted(key for key in files if key in view)
    chosen = known if count is None else sorted(random.Random(seed).sample(known, min(count, len(known))))
    none = Recomputed(name, len(view))
    if not chosen:
        return none, []
    try:
        backbone = Reference(space.spec, space.loader).load()
    except EmbedpipeError as exc:
        return none, [Finding("unproved", name, f"no row can be recomputed: {exc.message}")]
    arithmetic = {"precision": space.spec["precision"], "store_dtype": space.spec["stored_dtype"]}
    forward = resolve_settings(device=device, batch_size="auto", workers="auto", executor="eager", **arithmetic)
    current, stored = environment(forward.device), space.environments[-1]
    pins = stored.get("pins") or (space.meta and space.meta.pins)
    forward = forward.pinned({**pins, "executor": "eager"}) if pins else forward
    changes = differing_fields({name: stored[name] for name in current if name in stored}, current)
    done, largest, findings = 0, 0.0, list[Finding]()
    for rows in stream_rows([(key, files[key]) for key in chosen], Runner([backbone], forward.definite)):
        distances = row_distances(view.read(rows.keys), rows.features)
        findings += _differing(space, rows, distances.tolist(), changes)
        largest = max([largest, *distances.tolist()])
        done += len(rows)
        if progress:
            progress(f"verify {name}", done, len(chosen))
    return Recomputed(name, len(view), done, largest), findings


def _differing(space: Space, rows: Rows, distances: list[float], changes: list[Difference]) -> Iterator[Finding]:
    """Yield rows that cannot be recomputed or whose distance from the stored ones exceeds the tolerance of the precision."""
    from embedpipe.cache import DAMAGE, Finding
    from embedpipe.inference import TOLERANCE

    limit, place = TOLERANCE[space.spec["precision"]], space.folder.name
    origin = f"; it was computed in another environment: {', '.join(map(str, changes))}" if changes else ""
    for key, stage, reason in rows.failures:
        kind = "unproved" if stage in ("read", "limit") else DAMAGE
        yield Finding(kind, place, f"row {key.hex()[:12]}, recomputed: {reason}")
    for key, distance in zip(rows.keys, distances, strict=True):
        if distance > limit:
            reason = f"it differs from the stored row by {distance:.1e} of its norm, expected at most {limit:g}{origin}"
            yield Finding(DAMAGE, place, f"row {key.hex()[:12]}, recomputed: {reason}")

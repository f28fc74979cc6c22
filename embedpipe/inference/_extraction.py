"""compute_missing: decode, forward and commit the rows that spaces lack, each image once for all of them.

>>> [result] = compute_missing([FeatureRequest(space, backbone)], manifest, settings)
>>> result.computed, result.reused
(1000, 0)
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from embedpipe.cache import SpaceWriter
from embedpipe.data import ByteSource, Manifest
from embedpipe.errors import CacheBusy, CacheMismatch, StorageError, warn
from embedpipe.images import DECODER
from embedpipe.inference._drift import check_drift, is_new, record_environment
from embedpipe.inference._executor_selection import record_run, select_executor
from embedpipe.inference._lookup import (
    ExtractionResult,
    FeatureRequest,
    Lookup,
    look_up,
    missing_images,
    row_bytes,
    summarise,
)
from embedpipe.inference._runner import Rows, Runner, stream_rows
from embedpipe.inference._settings import InferenceSettings
from embedpipe.provenance import canonical_json
from embedpipe.storage import check_free_space

Progress = Callable[[str, int, int], None]
Commit = Callable[[Rows], float]  # returns the seconds that it took
Transient = dict[bytes, tuple[str, str]]  # failures that are not stored, since they may pass: key -> (stage, reason)

MOST_PENDING = 64  # batches of rows that wait for the disk
MEASURED_BATCHES = 4  # of an estimate, for each stream
REMOVED_EXECUTOR = "fused"


def compute_missing(
    requests: Sequence[FeatureRequest],
    manifest: Manifest,
    settings: InferenceSettings,
    *,
    shard_rows: int = 1024,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> list[ExtractionResult]:
    """Compute the rows of `manifest` that spaces lack, with one decode for all, and commit them shard by shard.

    Parameters
    ----------
    settings : InferenceSettings    the pins of a space whose extraction was interrupted replace them

    Raises
    ------
    StorageError     the disk cannot hold the new rows, or refuses to write
    CacheBusy        another process writes to one of the spaces
    CacheMismatch    stored rows are computed differently in this environment
    """
    _discard_removed(requests)
    groups: dict[str, dict[Path, FeatureRequest]] = defaultdict(dict)  # a space that is requested twice is filled once
    for request in requests:
        groups[canonical_json(pins_of(request))][request.space.folder] = request
    results: dict[Path, ExtractionResult] = {}
    options: dict[str, Any] = {"shard_rows": shard_rows, "retry_failed": retry_failed, "progress": progress}
    for group in groups.values():
        results |= zip(group, _fill_group(list(group.values()), manifest, settings, **options), strict=True)
    return [results[request.space.folder] for request in requests]


def estimate_run(
    requests: Sequence[FeatureRequest], lookups: Sequence[Lookup], manifest: Manifest, settings: InferenceSettings
) -> tuple[float, int, str]:
    """Return the expected seconds of `compute_missing`, the number of images measured, and the executor; nothing is written."""
    images = missing_images(manifest, lookups)
    if not images:
        return 0.0, 0, "none"
    start = time.monotonic()
    lacking = [request.backbone for request, found in zip(requests, lookups, strict=True) if found.missing]
    runner = select_executor(lacking, settings, images.items(), work=len(images))
    sample = dict(list(images.items())[: MEASURED_BATCHES * runner.settings.batch_size * runner.settings.streams])
    warm = time.monotonic()
    count = sum(len(rows) for rows in stream_rows(sample.items(), runner) if rows.backbone == 0)
    image_s = (time.monotonic() - warm) / max(count, 1)
    return warm - start + image_s * len(images), len(sample), runner.settings.executor


def pins_of(request: FeatureRequest) -> dict[str, Any]:
    """Return the pins of a space whose extraction was interrupted; empty elsewhere."""
    meta = request.space.meta
    return dict(meta.pins or {}) if meta else {}


def _discard_removed(requests: Sequence[FeatureRequest]) -> None:
    """Drop the pending rows of interrupted extractions whose executor was removed: all rows come from one executor."""
    for request in requests:
        if pins_of(request).get("executor") == REMOVED_EXECUTOR:
            request.space.discard_pending()
            reason = f"was interrupted under --executor {REMOVED_EXECUTOR}, which was removed"
            text = f"{request.space.folder.name} {reason}; its unfinished rows are computed again"
            warn(text)


def _fill_group(
    requests: Sequence[FeatureRequest],
    manifest: Manifest,
    settings: InferenceSettings,
    *,
    shard_rows: int,
    retry_failed: bool,
    progress: Progress | None,
) -> list[ExtractionResult]:
    """Fill spaces that have the same pins, or none."""

    def look(request: FeatureRequest) -> Lookup:
        return look_up(request.space, manifest, splits=request.splits, retry_failed=retry_failed)

    pins = pins_of(requests[0])
    settings = settings.pinned(pins) if pins else settings
    lookups = [look(request) for request in requests]
    lacking = [n for n, found in enumerate(lookups) if found.missing]
    for n in lacking:
        requests[n].space.ensure_free()  # before the executor is chosen, which takes seconds
    images, backbones = missing_images(manifest, lookups), [requests[n].backbone for n in lacking]
    runner = select_executor(backbones, settings, images.items(), work=len(images)) if lacking else None
    settings = runner.settings if runner else settings.definite
    if pins and pins != settings.pins:
        message = f"this extraction was interrupted under {canonical_json(pins)}, which does not work here"
        hint = "continue where it was started, or remove the space (`embedpipe cache ls`, `cache rm`) and start again"
        raise CacheMismatch(message, hint=hint)
    records = [_check_environment(*one, manifest, settings) for one in zip(requests, lookups, strict=True)]
    transient: list[Transient] = [{} for _ in requests]
    writers: dict[int, SpaceWriter] = {}
    with ExitStack() as stack:
        for n, (request, record) in enumerate(zip(requests, records, strict=True)):
            if lookups[n].missing or request.space.interrupted:
                _check_disk(request, len(lookups[n].missing))
                writers[n] = stack.enter_context(_writer(request, settings, record, shard_rows))
                if writers[n].pins != settings.pins:  # of a process that began, and was interrupted, meanwhile
                    raise CacheBusy("another process has just written to this space", hint="run the same command again")
                lookups[n] = look(request)
            elif "probed" in record:
                with suppress(CacheBusy, StorageError), _writer(request, settings, record, shard_rows) as writer:
                    writer.finish()  # else the rows are checked again next time
        busy_s = dict[str, float]()
        if runner:
            for n in lacking:
                writers[n].forget_failures([key for key in lookups[n].missing if key in lookups[n].view.failures])
            commits = [functools.partial(_commit, writers[n], transient[n]) for n in lacking]
            busy_s = _compute(runner, [lookups[n] for n in lacking], commits, manifest, progress)
        for writer in writers.values():
            writer.finish()
    bottleneck = max(busy_s, key=busy_s.__getitem__) if any(busy_s.values()) else "none"
    ran = (bottleneck, settings.executor, runner.difference) if runner else ()
    return [summarise(manifest, lookups[n], one.space.view(), transient[n], *ran) for n, one in enumerate(requests)]


def _check_environment(
    request: FeatureRequest, found: Lookup, manifest: Manifest, settings: InferenceSettings
) -> dict[str, Any]:
    """Return the record of this environment; where it is new to the space, compute a few stored rows again first."""
    record = record_environment(settings, request.loader)
    if is_new(request.space, record, computing=bool(found.missing)):
        items = [(key, manifest.byte_source_of(sample)) for key, sample in found.wanted.items() if key in found.view]
        record["probed"] = check_drift(request.space, found.view, items, Runner([request.backbone], settings))
    return record


def _check_disk(request: FeatureRequest, rows: int) -> None:
    """Raise StorageError if the disk cannot hold the new rows twice: in shards and in the merged file."""
    space = request.space
    stored = space.features_path.stat().st_size if space.features_path.exists() else 0
    check_free_space(space.folder, 2 * rows * row_bytes(request) + min(stored, 1 << 30))


def _writer(
    request: FeatureRequest, settings: InferenceSettings, record: Mapping[str, Any], shard_rows: int
) -> SpaceWriter:
    return request.space.writer(
        feature_dim=request.backbone.feature_dim,
        dtype=settings.store_dtype,
        environment=record,
        pins=settings.pins,
        shard_rows=shard_rows,
    )


def _compute(
    runner: Runner, lookups: Sequence[Lookup], commits: Sequence[Commit], manifest: Manifest, progress: Progress | None
) -> dict[str, float]:
    """Compute and commit the missing rows of each backbone of a runner; return the seconds of each stage per thread.

    Images that several backbones lack are decoded once.
    """
    images = missing_images(manifest, lookups)
    passes: dict[tuple[int, ...], list[tuple[bytes, ByteSource]]] = defaultdict(list)
    for key, place in images.items():
        passes[tuple(n for n, found in enumerate(lookups) if key in found.missing)].append((key, place))
    report, busy_s = _reporter(progress, len(images)), dict.fromkeys(("decode", "forward", "commit"), 0.0)
    for backbones, items in passes.items():
        whole = len(backbones) == len(lookups)
        part = runner if whole else Runner([runner.backbones[n] for n in backbones], runner.settings)
        busy_s["commit"] += _stream(part, items, [commits[n] for n in backbones], report)
        record_run(part)
        busy_s["decode"] += part.decode_s / part.settings.workers
        busy_s["forward"] += part.forward_s / part.settings.streams
    return busy_s


def _stream(
    runner: Runner, items: Sequence[tuple[bytes, ByteSource]], commits: Sequence[Commit], report: Callable[[int], None]
) -> float:
    """Compute rows in this thread and commit them in another one; return the seconds that commits took."""
    pending: deque[Future[float]] = deque()
    seconds = 0.0
    with ThreadPoolExecutor(1, thread_name_prefix="commit") as committing:
        for rows in stream_rows(items, runner):
            pending.append(committing.submit(commits[rows.backbone], rows))
            while pending and (pending[0].done() or len(pending) > MOST_PENDING):
                seconds += pending.popleft().result()
            if rows.backbone == 0:
                report(len(rows))
        return seconds + sum(future.result() for future in pending)


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return a function that adds to a count and passes the sum to `progress`."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("extract", done, total)

    report(0)
    return report


def _commit(writer: SpaceWriter, transient: Transient, rows: Rows) -> float:
    """Give rows to the writer, note failures, and return the seconds that this took."""
    start = time.monotonic()
    writer.append(rows.keys, rows.features)
    for key, stage, reason in rows.failures:
        if stage == "decode":  # the same bytes always fail
            writer.fail(key, stage, reason, DECODER)
        else:
            transient[key] = (stage, reason)
    return time.monotonic() - start

"""Rows for whoever asks: from a manifest to keys, to what the cache holds, and for the rest decode, forward and commit.

Deeds enter here. torch is imported when the first batch is about to run, not before: a run that finds every row in the
cache decodes nothing and forwards nothing.

>>> filled = fill_space(space, manifest, backbone, Forward(device="cpu"))
>>> filled.computed, filled.reused
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Space, SpaceView, SpaceWriter
from embedpipe.disk import check_free_space
from embedpipe.drift import check_drift, is_new, record_environment
from embedpipe.errors import CacheBusy, StorageError
from embedpipe.forwarding import Forward, stream_rows
from embedpipe.images import DECODER
from embedpipe.manifest import Failure, Manifest, Sample

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Filled:
    """What filling a space took: rows computed, rows found there, failures of this data set, and where the time went."""

    computed: int
    reused: int
    failed: tuple[Failure, ...]
    waited_s: float
    forward_s: float

    @property
    def bottleneck(self) -> str:
        """The stage that set the pace: `decode`, `forward`, or `none` when nothing was computed."""
        if not self.computed:
            return "none"
        return "decode" if self.waited_s > self.forward_s else "forward"


@dataclass(frozen=True)
class Lookup:
    """What a space says of a manifest: its samples by key, a view of the rows, and the samples still to compute."""

    wanted: dict[bytes, Sample]
    view: SpaceView
    missing: dict[bytes, Sample]

    @property
    def present(self) -> dict[bytes, Sample]:
        return {key: sample for key, sample in self.wanted.items() if key in self.view}


@dataclass
class Tally:
    """What happens while a space is filled: failures that may pass next time, and where the time goes."""

    passing: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    waited_s: float = 0.0
    forward_s: float = 0.0


def space_spec(backbone: Backbone, precision: str, store_dtype: str) -> dict[str, Any]:
    """Return all that shapes a row: what the fingerprint of a space is taken from."""
    return {**backbone.spec, "precision": precision, "stored_dtype": store_dtype, "view": 0}


def space_name(spec: Mapping[str, Any]) -> str:
    """Return the readable prefix of a space's folder, such as `timm-resnet18`."""
    return re.sub(r"[^\w.+-]+", "-", f"{spec['source']}-{spec['architecture']}")


def look_up(space: Space, manifest: Manifest, *, retry_failed: bool = False) -> Lookup:
    """Return what a space holds and lacks of a manifest; recorded failures are not lacking unless tried again."""
    wanted: dict[bytes, Sample] = {}
    for sample in manifest.samples:
        wanted.setdefault(sample.key, sample)
    view = space.view()
    failures = {} if retry_failed else view.failures
    return Lookup(wanted, view, {k: s for k, s in wanted.items() if k not in view and k not in failures})


def reuse_space(
    space: Space, manifest: Manifest, record: Mapping[str, Any], *, retry_failed: bool = False
) -> Filled | None:
    """Return what `fill_space` would where it has nothing to compute and nothing to prove, else None; no model is needed.

    Parameters
    ----------
    record : dict    of this environment, as `record_environment` returns it
    """
    found = look_up(space, manifest, retry_failed=retry_failed)
    if found.missing or space.interrupted or is_new(space, record, computing=False):
        return None
    return _summarise(manifest, found, found.view, Tally())


def fill_space(
    space: Space,
    manifest: Manifest,
    backbone: Backbone,
    forward: Forward,
    *,
    shard_rows: int = 1024,
    retry_failed: bool = False,
    progress: Progress | None = None,
    loader: Mapping[str, Any] | None = None,
) -> Filled:
    """Compute the rows of `manifest` that `space` lacks, and commit them shard by shard.

    Parameters
    ----------
    loader : mapping
        How the backbone was named; recorded beside the features so that a head can load it again.

    Raises
    ------
    StorageError     the disk cannot hold what is planned, or refused while writing
    CacheBusy        somebody else writes to this space
    CacheMismatch    stored rows come out differently in this environment
    """
    meta = space.meta
    forward = forward.pinned(meta.pins) if meta and meta.pins else forward
    record = record_environment(forward, loader or {})
    found = look_up(space, manifest, retry_failed=retry_failed)
    drifted = is_new(space, record, computing=bool(found.missing))
    if drifted:
        items = [(key, manifest.file_of(sample)) for key, sample in found.present.items()]
        record |= {"probed": check_drift(space, found.view, items, backbone, forward)}
    tally, after = Tally(), found.view
    open_writer = partial(
        space.writer,
        feature_dim=backbone.feature_dim,
        dtype=forward.store_dtype,
        environment=record,
        pins=forward.pins,
        shard_rows=shard_rows,
    )
    if found.missing or space.interrupted:
        _check_plan(space, len(found.missing), backbone, forward)
        with open_writer() as writer:
            found = look_up(space, manifest, retry_failed=retry_failed)
            report = _reporter(progress, "extract", len(found.missing))
            _fill(writer, manifest, found, backbone, forward.pinned(writer.pins), tally, report)
        after = space.view()
    elif drifted:
        with suppress(CacheBusy, StorageError), open_writer() as writer:  # else it is probed again next time
            writer.finish()
    return _summarise(manifest, found, after, tally)


def _fill(
    writer: SpaceWriter,
    manifest: Manifest,
    found: Lookup,
    backbone: Backbone,
    forward: Forward,
    tally: Tally,
    report: Callable[[int], None],
) -> None:
    writer.forget_failures([key for key in found.missing if key in found.view.failures])
    items = [(key, manifest.file_of(sample)) for key, sample in found.missing.items()]
    for rows in stream_rows(items, backbone, forward):
        writer.append(rows.keys, rows.features)
        for key, stage, reason in rows.failures:
            if stage == "decode":  # the same bytes will always fail so
                writer.fail(key, stage, reason, DECODER)
            else:
                tally.passing[key] = (stage, reason)
        tally.waited_s, tally.forward_s = tally.waited_s + rows.waited_s, tally.forward_s + rows.forward_s
        report(len(rows))
    writer.finish()


def _summarise(manifest: Manifest, found: Lookup, after: SpaceView, tally: Tally) -> Filled:
    reasons = {key: (stage, reason) for key, (stage, reason, _) in after.failures.items()} | tally.passing
    failed = tuple(
        Failure(manifest.name_of(sample), *reasons[sample.key]) for sample in manifest.samples if sample.key in reasons
    )
    computed = sum(key not in reasons for key in found.missing)
    reused = sum(key not in reasons for key in found.wanted) - computed
    return Filled(computed, reused, (*manifest.unreadable, *failed), tally.waited_s, tally.forward_s)


def _check_plan(space: Space, rows: int, backbone: Backbone, forward: Forward) -> None:
    """Refuse a plan that the disk cannot hold: the new rows once in shards and once in the compacted file."""
    row_bytes = backbone.feature_dim * np.dtype(forward.store_dtype).itemsize + 32
    held = space.features_path.stat().st_size if space.features_path.exists() else 0
    check_free_space(space.folder, 2 * rows * row_bytes + min(held, 1 << 30))


def _reporter(progress: Progress | None, label: str, total: int) -> Callable[[int], None]:
    """Return a function that adds to a count and tells `progress`."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(label, done, total)

    report(0)
    return report

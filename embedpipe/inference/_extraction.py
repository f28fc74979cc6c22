"""fill_spaces: decode, forward and commit what spaces lack, each image once for all of them."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedpipe.cache import SpaceWriter
from embedpipe.data import Manifest, Place, Sample
from embedpipe.errors import CacheBusy, CacheMismatch, EmbedpipeWarning, StorageError
from embedpipe.images import DECODER
from embedpipe.inference._drift import check_drift, is_new, record_environment
from embedpipe.inference._executor_selection import record_run, settle
from embedpipe.inference._lookup import Filled, Lookup, Target, ahead_of, look_up, row_bytes, summarise
from embedpipe.inference._runner import Rows, Runner
from embedpipe.inference._settings import Forward
from embedpipe.inference._stream import stream_rows
from embedpipe.provenance import canonical_json
from embedpipe.storage import check_free_space

Progress = Callable[[str, int, int], None]
MOST_PENDING = 64  # batches of rows on their way to the disk
REMOVED_EXECUTOR = "fused"


@dataclass(frozen=True)
class Order:
    """What is to be filled in, and how: the arguments of `fill_spaces` that all of its steps go by."""

    manifest: Manifest
    shard_rows: int
    retry_failed: bool
    progress: Progress | None
    graphs: Path | None

    def look(self, target: Target) -> Lookup:
        return look_up(target.space, self.manifest, splits=target.splits, retry_failed=self.retry_failed)


@dataclass
class Job:
    """One space while it is filled.

    record : dict      of this environment, to be stored beside the rows
    new : bool         no row has been proved in this environment yet
    passing : dict     failures that may pass next time: key -> (stage, reason)
    """

    target: Target
    found: Lookup
    record: dict[str, Any] = field(default_factory=dict)
    new: bool = False
    passing: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    writer: SpaceWriter | None = None


@dataclass
class Clock:
    """Seconds of work, as a share of what the threads of a stage could do; the busiest stage sets the pace."""

    decode_s: float = 0.0
    forward_s: float = 0.0
    commit_s: float = 0.0

    @property
    def bottleneck(self) -> str:
        shares = {"decode": self.decode_s, "forward": self.forward_s, "commit": self.commit_s}
        return max(shares, key=lambda name: shares[name]) if any(shares.values()) else "none"


def fill_spaces(
    targets: Sequence[Target],
    manifest: Manifest,
    forward: Forward,
    *,
    shard_rows: int = 1024,
    retry_failed: bool = False,
    progress: Progress | None = None,
    graphs: Path | None = None,
) -> list[Filled]:
    """Compute the rows of `manifest` that spaces lack, with one decode for all, and commit them shard by shard.

    Parameters
    ----------
    forward : Forward    as planned; the pins of a space whose extraction was interrupted win over it
    graphs : Path        folder where converted graphs are kept

    Raises
    ------
    StorageError     the disk cannot hold what is planned, or refused while writing
    CacheBusy        somebody else writes to one of the spaces
    CacheMismatch    stored rows come out differently in this environment
    """
    filled: dict[Path, Filled] = {}
    _discard_removed(targets)
    order = Order(manifest, shard_rows, retry_failed, progress, graphs)
    for some in _by_pins(targets):
        pins = pins_of(some[0])
        done = _fill_together(order, some, forward.pinned(pins) if pins else forward)
        filled |= zip((target.space.folder for target in some), done, strict=True)
    return [filled[target.space.folder] for target in targets]


def _discard_removed(targets: Sequence[Target]) -> None:
    """Drop the pending rows of interrupted extractions whose executor no longer exists; all rows get the same one."""
    for target in targets:
        if pins_of(target).get("executor") == REMOVED_EXECUTOR:
            target.space.discard_pending()
            warnings.warn(
                f"{target.space.folder.name} was interrupted while --executor {REMOVED_EXECUTOR}, which was removed, "
                "computed it; its unfinished rows are computed again",
                EmbedpipeWarning,
                stacklevel=3,
            )


def pins_of(target: Target) -> dict[str, Any]:
    """Return the pins of a space whose extraction was interrupted, none elsewhere."""
    meta = target.space.meta
    return dict(meta.pins or {}) if meta else {}


def _by_pins(targets: Sequence[Target]) -> list[list[Target]]:
    """Group targets that can be filled under the same settings; a space that is asked for twice is filled once."""
    groups: dict[str, list[Target]] = defaultdict(list)
    for target in {target.space.folder: target for target in targets}.values():
        groups[canonical_json(pins_of(target))].append(target)
    return list(groups.values())


def _fill_together(order: Order, targets: Sequence[Target], forward: Forward) -> list[Filled]:
    """Fill several spaces under the same settings."""
    jobs = [Job(target, order.look(target)) for target in targets]
    lacking = [job for job in jobs if job.found.missing]
    for job in lacking:
        job.target.space.ensure_free()  # before anything is measured in vain
    runner = _settle(order, lacking, forward) if lacking else None
    if runner:
        _keep_pins(pins_of(targets[0]), runner.settings)
    forward, clock = runner.settings if runner else forward.definite, Clock()
    for job in jobs:
        _prove(order, job, forward)
    with ExitStack() as held:
        for job in jobs:
            if job.found.missing or job.target.space.interrupted:
                _check_plan(job, forward)
                job.writer = held.enter_context(_open(job, forward, order.shard_rows))
                _obey(job.writer, forward)
                job.found = order.look(job.target)
            elif job.new:
                with suppress(CacheBusy, StorageError), _open(job, forward, order.shard_rows) as writer:
                    writer.finish()  # else it is probed again next time
        if runner:
            _compute(order, lacking, runner, clock)
        for job in jobs:
            if job.writer:
                job.writer.finish()
    ran = (clock.bottleneck, forward.executor, runner.difference) if runner else ()
    return [summarise(order.manifest, job.found, job.target.space.view(), job.passing, *ran) for job in jobs]


def _settle(order: Order, lacking: Sequence[Job], forward: Forward) -> Runner:
    """Return a runner for the spaces that lack rows."""
    ahead = ahead_of(order.manifest, [job.found for job in lacking])
    backbones = [job.target.backbone for job in lacking]
    return settle(backbones, forward, ahead.items(), work=len(ahead), graphs=order.graphs)


def _prove(order: Order, job: Job, forward: Forward) -> None:
    """Note this environment in a job; where it is new to the space, compute a few of its rows again."""
    target, view = job.target, job.found.view
    job.record = record_environment(forward, target.loader)
    job.new = is_new(target.space, job.record, computing=bool(job.found.missing))
    if job.new:
        items = [(key, order.manifest.place_of(sample)) for key, sample in job.found.present.items()]
        probe = Runner([target.backbone], forward, graphs=order.graphs)
        job.record |= {"probed": check_drift(target.space, view, items, probe)}


def _open(job: Job, forward: Forward, shard_rows: int) -> SpaceWriter:
    return job.target.space.writer(
        feature_dim=job.target.backbone.feature_dim,
        dtype=forward.store_dtype,
        environment=job.record,
        pins=forward.pins,
        shard_rows=shard_rows,
    )


def _keep_pins(pins: Mapping[str, Any], forward: Forward) -> None:
    """Refuse to go on with an interrupted extraction in another way than it was begun in."""
    if pins and pins != forward.pins:
        raise CacheMismatch(
            f"this extraction was interrupted under {canonical_json(dict(pins))}, which does not work here",
            hint="go on where it was begun, or remove the space (`embedpipe cache ls`, `cache rm`) and begin again",
        )


def _obey(writer: SpaceWriter, forward: Forward) -> None:
    """Refuse a space that another process began to fill, and left, since its pins were read."""
    if writer.pins != forward.pins:
        raise CacheBusy("another process has just written to this space", hint="run the same command again")


def _compute(order: Order, lacking: Sequence[Job], runner: Runner, clock: Clock) -> None:
    """Decode, forward and commit what the spaces lack; each image once for all that lack it."""
    wanted: dict[bytes, Sample] = {}
    lackers: dict[bytes, list[int]] = defaultdict(list)
    for number, job in enumerate(lacking):
        if job.writer:
            job.writer.forget_failures([key for key in job.found.missing if key in job.found.view.failures])
        for key, sample in job.found.missing.items():
            wanted.setdefault(key, sample)
            lackers[key].append(number)
    passes: dict[tuple[int, ...], list[tuple[bytes, Place]]] = defaultdict(list)
    for key, sample in wanted.items():
        passes[tuple(lackers[key])].append((key, order.manifest.place_of(sample)))
    report = _reporter(order.progress, "extract", len(wanted))
    for numbers, items in passes.items():
        jobs = [lacking[n] for n in numbers]
        whole = len(jobs) == len(lacking)
        one = runner if whole else Runner([job.target.backbone for job in jobs], runner.settings, graphs=order.graphs)
        _stream(jobs, items, one, clock, report, order.graphs)


def _stream(
    jobs: Sequence[Job],
    items: Sequence[tuple[bytes, Place]],
    runner: Runner,
    clock: Clock,
    report: Callable[[int], None],
    graphs: Path | None,
) -> None:
    """Compute rows here and commit them in a thread of its own, so that neither waits for the other."""
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="commit") as committing:
        for rows in stream_rows(items, runner):
            pending.append(committing.submit(_commit, jobs[rows.backbone], rows, clock))
            while pending and (pending[0].done() or len(pending) > MOST_PENDING):
                pending.popleft().result()
            if rows.backbone == 0:
                report(len(rows))
        for future in pending:
            future.result()
    record_run(runner, graphs)
    clock.decode_s += runner.decode_s / runner.settings.workers
    clock.forward_s += runner.forward_s / runner.settings.streams


def _commit(job: Job, rows: Rows, clock: Clock) -> None:
    start, writer = time.monotonic(), job.writer
    assert writer is not None
    writer.append(rows.keys, rows.features)
    for key, stage, reason in rows.failures:
        if stage == "decode":  # the same bytes will always fail so
            writer.fail(key, stage, reason, DECODER)
        else:
            job.passing[key] = (stage, reason)
    clock.commit_s += time.monotonic() - start


def _check_plan(job: Job, forward: Forward) -> None:
    """Refuse a plan that the disk cannot hold: the new rows once in shards and once in the compacted file."""
    space, rows = job.target.space, len(job.found.missing)
    held = space.features_path.stat().st_size if space.features_path.exists() else 0
    check_free_space(space.folder, 2 * rows * row_bytes(job.target) + min(held, 1 << 30))


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

"""plan_spaces: what filling would take, from a short measured run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from embedpipe.cache import Space
from embedpipe.data import Manifest
from embedpipe.inference._executor_selection import settle
from embedpipe.inference._lookup import Target, ahead_of, look_up, row_bytes
from embedpipe.inference._settings import Forward
from embedpipe.inference._stream import stream_rows

MEASURED_BATCHES = 4  # for each stream


@dataclass(frozen=True)
class PlannedSpace:
    """What filling one space would take: rows missing and there, and the bytes of the missing ones."""

    space: Space
    feature_dim: int
    missing: int
    present: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.missing * self.row_bytes


@dataclass(frozen=True)
class Planned:
    """What filling spaces would take.

    seconds : float    expected, from `measured` images that were decoded and forwarded, and the warm-up of the executor
    """

    spaces: tuple[PlannedSpace, ...]
    seconds: float = 0.0
    measured: int = 0
    executor: str = "none"


def plan_spaces(
    targets: Sequence[Target], manifest: Manifest, forward: Forward, *, retry_failed: bool = False
) -> Planned:
    """Return what `fill_spaces` would take, from a short measured run; nothing is written."""
    founds = [look_up(t.space, manifest, splits=t.splits, retry_failed=retry_failed) for t in targets]
    lacking = [target.backbone for target, found in zip(targets, founds, strict=True) if found.missing]
    spaces = tuple(
        PlannedSpace(t.space, t.backbone.feature_dim, len(f.missing), len(f.wanted) - len(f.missing), row_bytes(t))
        for t, f in zip(targets, founds, strict=True)
    )
    ahead = ahead_of(manifest, founds)
    if not ahead:
        return Planned(spaces)
    start = time.monotonic()
    runner = settle(lacking, forward, ahead.items(), work=len(ahead))
    short = dict(list(ahead.items())[: MEASURED_BATCHES * runner.settings.batch_size * runner.settings.streams])
    settled, count = time.monotonic(), 0
    for rows in stream_rows(short.items(), runner):
        count += len(rows) if rows.backbone == 0 else 0
    per_image_s = (time.monotonic() - settled) / max(count, 1)
    return Planned(spaces, settled - start + per_image_s * len(ahead), len(short), runner.settings.executor)

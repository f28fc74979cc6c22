"""Is it worth keeping activations? Decided by where the model can be cut, the options, the disk, and what was measured.

>>> source, report = choose_source(network, photos, wish, cache, progress=None)
>>> report["cut"], report["activations"]["reason"]
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedpipe.backbones import cut_before, unfreeze_parameters
from embedpipe.cache import Cache
from embedpipe.classifier import Network
from embedpipe.commands.finetune._activations import Activations, Place, fill, read, spaces_of
from embedpipe.commands.finetune._photos import Photos
from embedpipe.errors import UsageError
from embedpipe.inference import Progress, Target, look_up, row_bytes
from embedpipe.storage import TEMPORARY, make_folder, show_size, storage_errors

HALF_DRIFT = 0.05  # of the largest logit: what float16 may change
KEPT_FREE = 1 << 30  # bytes of the disk that are left alone
READ_PROBE = 16 << 20  # bytes


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    cached : "auto", "on" or "off"
    unfreeze : tuple of str
    epochs : int         of all phases
    views : int          augmented views to keep of each training image; 0: the clean one
    augment : str        how a view differs
    max_bytes : float    that the activations may take
    images_only : str    an option that needs images in every epoch; "" where there is none
    dtype : str          that the train split has to be stored in
    """

    cached: str
    unfreeze: tuple[str, ...]
    epochs: int
    views: int
    augment: str
    seed: int
    max_bytes: float
    images_only: str = ""
    dtype: str | None = None

    @property
    def look(self) -> dict[str, Any]:
        return {"augment": self.augment, "seed": self.seed}


def choose_source(
    network: Network,
    photos: Photos,
    wish: Wish,
    cache: Cache,
    before: Mapping[str, Any] | None,
    *,
    progress: Progress | None,
) -> tuple[Photos | Activations, dict[str, Any]]:
    """Return what to train on, and of the report `cut` and `activations`; on activations the network is left its tail.

    Of several ranks the first decides and computes.

    Parameters
    ----------
    before : dict    what the run trained on until it was stopped, and has to go on with

    Raises
    ------
    UsageError    activations were asked for, and cannot be had or do not fit
    """
    if wish.views and wish.augment == "none":
        raise UsageError(f"--views {wish.views} without --augment", hint="try --augment flip, standard or strong")
    if before:
        old = before["activations"]
        wish = replace(wish, cached="on" if old["cached"] else "off", dtype=old.get("stored_dtype"))
    try:
        place = _place(photos, wish)
        found = photos.ranks.tell(lambda: _kept(network, place, photos, wish, cache, progress))
        if not found["cached"]:
            raise _Images(found["reason"])
    except _Images as exc:
        if wish.cached == "on":
            raise UsageError(f"no activations can be kept: {exc}", hint="leave out --cache-activations on") from exc
        return photos, dict(before or {"cut": None, "activations": {**_NONE, "reason": str(exc)}})
    network.backbone = place.tail
    targets = spaces_of(place, cache, photos, found["stored_dtype"], wish.views, **wish.look)
    return read(place, photos, targets), {"cut": place.layer, "activations": found}


_NONE = {"cached": False, "rows": 0, "bytes": 0, "reused": 0}


class _Images(Exception):
    """Why images are decoded in every epoch."""


def _place(photos: Photos, wish: Wish) -> Place:
    if wish.cached == "off":
        raise _Images("--cache-activations off")
    if wish.images_only:
        raise _Images(f"{wish.images_only} changes images in every epoch")
    if wish.augment != "none" and not wish.views:
        raise _Images(f"--augment {wish.augment} changes images in every epoch; --views 4 would keep four of each")
    unfrozen = unfreeze_parameters(photos.backbone, wish.unfreeze)
    try:
        return Place.of(photos.backbone, cut_before(photos.backbone, unfrozen))
    except UsageError as exc:
        raise _Images(exc.message) from exc


def _kept(
    network: Network, place: Place, photos: Photos, wish: Wish, cache: Cache, progress: Progress | None
) -> dict[str, Any]:
    """Fill the spaces where that is worth it, train in float16 where that changes next to nothing; tell what was done."""
    drift, changes, largest = _float16_error(network, place, photos)
    small = not changes and drift <= HALF_DRIFT * largest and place.layer != "head"
    dtype = wish.dtype or ("float16" if small else "float32")
    plan = _Plan.of(spaces_of(place, cache, photos, dtype, wish.views, **wish.look), photos)
    try:
        reason = _worth(place, photos, plan, wish, cache)
    except _Images as exc:
        return {**_NONE, "reason": str(exc)}
    counts = fill(cache, photos, plan.targets, progress)
    stored = {"stored_dtype": dtype, "packed": False, "float16_max_abs_diff": drift}
    return {"cached": True, **counts, "views": wish.views, **stored, "reason": reason}


def _float16_error(network: Network, place: Place, photos: Photos) -> tuple[float, bool, float]:
    """Return how far float16 activations move a logit at most, whether an arg max changes, and the largest logit."""
    worst, changes, largest = 0.0, False, 0.0
    with torch.inference_mode():
        for images, _ in photos.probe:
            exact = place.trunk.module(images).reshape(-1, *place.shape)
            before, after = (network.head(place.tail(one)) for one in (exact, exact.half().float()))
            worst = max(worst, float((after - before).abs().nan_to_num(torch.inf).max()))
            changes = changes or bool((after.argmax(1) != before.argmax(1)).any())
            largest = max(largest, float(before.abs().max()))
    return worst, changes, largest


@dataclass(frozen=True)
class _Plan:
    """Spaces to fill.

    missing : int    rows to compute
    needed : int     bytes that the disk has to have for them: once in shards, once in the merged file
    total : int      bytes of all rows
    """

    targets: Sequence[Target]
    missing: int
    needed: int
    total: int

    @classmethod
    def of(cls, targets: Sequence[Target], photos: Photos) -> _Plan:
        manifest = photos.features.manifest
        looked = [(look_up(target.space, manifest, splits=target.splits), row_bytes(target)) for target in targets]
        missing = sum(len(found.missing) for found, _ in looked)
        needed = 2 * sum(len(found.missing) * size for found, size in looked)
        return cls(targets, missing, needed, sum(len(found.wanted) * size for found, size in looked))

    def read_s(self, rate: float) -> float:
        """Return the seconds that a training row takes, from a disk that gives `rate` bytes/s."""
        return row_bytes(self.targets[0]) / rate


def _worth(place: Place, photos: Photos, plan: _Plan, wish: Wish, cache: Cache) -> str:
    """Return why the plan is worth its bytes."""
    folder = cache.spaces_folder
    make_folder(folder)
    rate, free = _read_rate(folder), shutil.disk_usage(folder).free - KEPT_FREE
    if plan.total > wish.max_bytes:
        raise _Images(f"they take {show_size(plan.total)}, --max-cache-size is {show_size(int(wish.max_bytes))}")
    if plan.needed > free:
        raise _Images(f"writing them takes {show_size(plan.needed)}, {show_size(max(0, free))} can be had in {folder}")
    if wish.cached == "on":
        return "--cache-activations on"
    trunk_s, read_s = _trunk_s(place, photos), plan.read_s(rate)
    once = plan.missing * trunk_s
    rows = wish.epochs * len(photos.samples("train")) + (wish.epochs + 1) * len(photos.samples("val"))
    story = (
        f"the trunk takes {1000 * trunk_s:.2g} ms an image, a row {1000 * read_s:.2g} ms to read: "
        f"{once + rows * read_s:.2g} s with activations, {rows * trunk_s:.2g} s without"
    )
    if once + rows * read_s >= rows * trunk_s:
        raise _Images(story)
    return story


def _trunk_s(place: Place, photos: Photos) -> float:
    """Return the seconds that the trunk takes for an image of the probe, the faster of two passes."""
    images, _ = photos.probe[0]
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        with torch.inference_mode():
            float(place.trunk.module(images).sum())
        seconds.append(time.monotonic() - start)
    return min(seconds) / len(images)


def _read_rate(folder: Path) -> float:
    """Return the bytes/s at which the disk gives back a file that memory does not hold."""
    path, content = folder / f"{TEMPORARY}read-{os.getpid()}", os.urandom(READ_PROBE)
    with storage_errors(path, "write"):
        try:
            with path.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.monotonic()
            path.read_bytes()
            return READ_PROBE / (time.monotonic() - start)
        finally:
            path.unlink(missing_ok=True)

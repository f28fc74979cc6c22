"""image_batches: files to full batches, decoded in processes of their own, in bounded memory."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from PIL import Image

from embedpipe.data import Place
from embedpipe.errors import DecodeError
from embedpipe.images._isolation import Decoders, Loaded
from embedpipe.images._transform import Transform

if TYPE_CHECKING:
    import torch

Key = TypeVar("Key", bound=bytes | None)
Images = Callable[[Image.Image], "torch.Tensor"]
Timed = tuple[list[Loaded], float]
READERS = 16  # threads that fetch what decoder processes cannot read themselves: they wait, decoders work
AHEAD = 16  # images, where batches are small: what is far away is asked for early
ALL = -1  # no transform has this image


@dataclass(frozen=True)
class Failed(Generic[Key]):
    """An image without pixels: for the transform of that index, or for `ALL`.

    stage : str    "read" and "limit" may pass next time, "decode" never will
    """

    key: Key
    stage: str
    reason: str
    transform: int = ALL


@dataclass(frozen=True)
class Batch(Generic[Key]):
    """Images that could be read, and what went wrong since the batch before.

    Parameters
    ----------
    images : list of arrays    one for each transform: uint8 (n, H, W, 3) of a `Transform`, to be normalised,
                               float32 (n, 3, H, W) of any other; black where that transform failed
    keys : n keys              as the items gave them
    failures : list            of what has no pixels
    decode_s : float           seconds of work in the decoders, summed
    """

    images: list[np.ndarray]
    keys: list[Key] = field(default_factory=list)
    failures: list[Failed[Key]] = field(default_factory=list)
    decode_s: float = 0.0

    def __len__(self) -> int:
        return len(self.keys)


def image_batches(
    items: Iterable[tuple[Key, Place | Path]],
    transforms: Sequence[Images],
    *,
    batch_size: int,
    workers: int,
    in_order: bool = True,
) -> Iterator[Batch[Key]]:
    """Read, check, decode and transform files, `workers` at a time; every batch but the last is full.

    Parameters
    ----------
    items : iterable of (key, place)    a file whose sha256 is not its key fails; None: no check
    transforms : callables              RGB image -> float32 (3, H, W), all of one decode; their errors are raised
    batch_size, workers : int >= 1      at most max(batch_size, AHEAD) + batch_size + workers images are held, read or decoded
    in_order : bool                     as the items come; else as they are ready, and a slow image holds up no other
    """
    keys: list[Key] = []
    found: list[list[np.ndarray | None]] = []
    failures: list[Failed[Key]] = []
    window, seconds = max(batch_size, AHEAD) + workers, 0.0
    for key, (parts, took_s) in _loaded(items, transforms, window=window, workers=workers, in_order=in_order):
        seconds += took_s
        failed = [Failed(key, *part, n) for n, part in enumerate(parts) if isinstance(part, tuple)]
        if len(failed) == len(parts):
            failures.append(Failed(key, failed[0].stage, failed[0].reason))
            continue
        failures += failed
        keys.append(key)
        found.append([None if isinstance(part, tuple) else part for part in parts])
        if len(keys) == batch_size:
            yield Batch(_stack(found, transforms), keys, failures, seconds)
            keys, found, failures, seconds = [], [], [], 0.0
    if keys or failures:
        yield Batch(_stack(found, transforms), keys, failures, seconds)


def _stack(found: Sequence[Sequence[np.ndarray | None]], transforms: Sequence[Images]) -> list[np.ndarray]:
    return [_stack_one([parts[n] for parts in found], transform) for n, transform in enumerate(transforms)]


def _stack_one(parts: Sequence[np.ndarray | None], transform: Images) -> np.ndarray:
    there = next((part for part in parts if part is not None), None)
    size = transform.crop_size if isinstance(transform, Transform) else (0, 0)
    black = np.zeros((*size, 3), np.uint8) if there is None else np.zeros_like(there)
    return (
        np.stack([black if part is None else part for part in parts])
        if parts
        else np.empty((0, *black.shape), black.dtype)
    )


def _loaded(
    items: Iterable[tuple[Key, Place | Path]],
    transforms: Sequence[Images],
    *,
    window: int,
    workers: int,
    in_order: bool,
) -> Iterator[tuple[Key, Timed]]:
    """Yield keys and one result a transform, with at most `window` items under way."""
    numbered = iter(enumerate(items))
    ready: SimpleQueue[tuple[int, Key, Future[Timed]]] = SimpleQueue()
    waiting: list[tuple[int, Key, Future[Timed]]] = []  # a heap by number
    taken = given = 0
    decoding = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    reading = ThreadPoolExecutor(
        max(READERS, workers), thread_name_prefix="read"
    )  # starts no thread before its first task
    decoders = Decoders(workers)

    def submit(number: int, key: Key, item: Place | Path) -> None:
        place = Place.of(item)
        executor = decoding if place.is_direct else reading
        future = executor.submit(_load, decoders, key, place, transforms)
        future.add_done_callback(lambda done: ready.put((number, key, done)))

    try:
        while True:
            for number, (key, place) in islice(numbered, window - (taken - given)):
                taken = number + 1
                submit(number, key, place)
            if given == taken:
                return
            while not waiting or (in_order and waiting[0][0] != given):
                heapq.heappush(waiting, ready.get())
            given += 1
            _, key, future = heapq.heappop(waiting)
            yield key, future.result()
    finally:
        for executor in (reading, decoding):
            executor.shutdown(wait=False, cancel_futures=True)
        decoders.give_up()
        for executor in (reading, decoding):
            executor.shutdown(wait=True)


def _load(decoders: Decoders, key: bytes | None, place: Place, transforms: Sequence[Images]) -> Timed:
    """Return pixels, or (stage, reason) of a failure, for each transform, and the seconds that it took.

    A decoder process does the dangerous part.
    """
    start = time.monotonic()
    asked = [transform.text if isinstance(transform, Transform) else None for transform in transforms]
    loaded = decoders.load(place, key=key, transforms=asked)
    parts = [_finish(part, transform) for part, transform in zip(loaded, transforms, strict=True)]
    return parts, time.monotonic() - start


def _finish(part: Loaded, transform: Images) -> Loaded:
    if isinstance(part, tuple) or isinstance(transform, Transform):
        return part
    try:
        return transform(Image.fromarray(part)).numpy()
    except DecodeError as exc:
        return "decode", str(exc)

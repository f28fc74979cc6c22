"""image_batches: full batches of images from files, decoded in separate processes, in bounded memory."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from PIL import Image

from embedpipe.data import ByteSource
from embedpipe.errors import DecodeError
from embedpipe.images._isolation import LIMITS, Decoders, Limits, Loaded
from embedpipe.images._transform import Transform

if TYPE_CHECKING:
    import torch

Key = TypeVar("Key", bound=bytes | None)
Images = Callable[[Image.Image], "torch.Tensor"]
Place = ByteSource | Path
Timed = tuple[list[Loaded], float]
READERS = 16  # threads that read the bytes which decoder processes cannot read themselves, such as URLs
PREFETCH = 16  # images read in advance at least, for remote files and small batches
ALL = -1  # the image failed for every transform


@dataclass(frozen=True)
class Failed(Generic[Key]):
    """An image that failed, for the transform of that index or for `ALL`.

    stage : str    "read" and "limit" may succeed next time, "decode" never does
    """

    key: Key
    stage: str
    reason: str
    transform: int = ALL


@dataclass(frozen=True)
class Batch(Generic[Key]):
    """Decoded images, and the failures since the previous batch.

    Parameters
    ----------
    images : list of arrays    one for each transform: uint8 (n, H, W, 3) of a `Transform`, not normalised yet,
                               float32 (n, 3, H, W) of any other; black where that transform failed
    keys : n keys              of the items
    failures : list of Failed
    decode_s : float           seconds of work in the decoders, summed
    """

    images: list[np.ndarray]
    keys: list[Key]
    failures: list[Failed[Key]]
    decode_s: float

    def __len__(self) -> int:
        return len(self.keys)


def image_batches(
    items: Iterable[tuple[Key, Place]],
    transforms: Sequence[Images],
    *,
    batch_size: int,
    workers: int,
    in_order: bool = True,
    limits: Limits = LIMITS,
) -> Iterator[Batch[Key]]:
    """Read, check, decode and transform files, `workers` at a time; every batch but the last is full.

    Parameters
    ----------
    items : iterable of (key, place)    a file whose sha256 is not its key fails; None: no check
    transforms : callables              RGB image -> float32 (3, H, W), applied to one decoded image; their errors are raised
    batch_size, workers : int >= 1      at most max(batch_size, PREFETCH) + batch_size + workers images are in memory
    in_order : bool                     True: in the order of the items; False: as they are ready, without waiting for slow ones
    limits : Limits                     of time and memory for one image
    """
    keys: list[Key] = []
    decoded: list[list[np.ndarray | None]] = []
    failures: list[Failed[Key]] = []
    decoders, window, seconds = Decoders(workers, limits), max(batch_size, PREFETCH) + workers, 0.0
    for key, (parts, decode_s) in _loaded(items, transforms, decoders, window=window, in_order=in_order):
        seconds += decode_s
        failed = [Failed(key, *part, n) for n, part in enumerate(parts) if isinstance(part, tuple)]
        if len(failed) == len(parts):
            failures.append(Failed(key, failed[0].stage, failed[0].reason))
            continue
        failures += failed
        keys.append(key)
        decoded.append([None if isinstance(part, tuple) else part for part in parts])
        if len(keys) == batch_size:
            yield Batch(_stack(decoded, transforms), keys, failures, seconds)
            keys, decoded, failures, seconds = [], [], [], 0.0
    if keys or failures:
        yield Batch(_stack(decoded, transforms), keys, failures, seconds)


def _stack(decoded: Sequence[Sequence[np.ndarray | None]], transforms: Sequence[Images]) -> list[np.ndarray]:
    """Return one array for each transform; images that failed are black."""

    def stack(parts: list[np.ndarray | None], transform: Images) -> np.ndarray:
        size = transform.crop_size if isinstance(transform, Transform) else (0, 0)
        black = np.zeros_like(next((part for part in parts if part is not None), np.zeros((*size, 3), np.uint8)))
        filled = [black if part is None else part for part in parts]
        return np.stack(filled) if filled else black[None][:0]

    return [stack([parts[n] for parts in decoded], transform) for n, transform in enumerate(transforms)]


def _loaded(
    items: Iterable[tuple[Key, Place]], transforms: Sequence[Images], decoders: Decoders, *, window: int, in_order: bool
) -> Iterator[tuple[Key, Timed]]:
    """Yield keys and one result for each transform, with at most `window` items in work."""
    numbered = iter(enumerate(items))
    ready: SimpleQueue[tuple[int, Key, Future[Timed]]] = SimpleQueue()
    waiting: list[tuple[int, Key, Future[Timed]]] = []  # a heap by number
    submitted = yielded = 0
    # both start no thread before their first task
    decoding = ThreadPoolExecutor(decoders.count, thread_name_prefix="decode")
    reading = ThreadPoolExecutor(max(READERS, decoders.count), thread_name_prefix="read")

    def submit(number: int, key: Key, item: Place) -> None:
        place = ByteSource.from_path(item)
        executor = decoding if place.is_local_range else reading
        future = executor.submit(_load, decoders, key, place, transforms)
        future.add_done_callback(lambda done: ready.put((number, key, done)))

    try:
        while True:
            for number, (key, place) in islice(numbered, window - (submitted - yielded)):
                submitted = number + 1
                submit(number, key, place)
            if yielded == submitted:
                return
            while not waiting or (in_order and waiting[0][0] != yielded):
                heapq.heappush(waiting, ready.get())
            yielded += 1
            _, key, future = heapq.heappop(waiting)
            yield key, future.result()
    finally:
        for executor in (reading, decoding):
            executor.shutdown(wait=False, cancel_futures=True)
        decoders.give_up()
        for executor in (reading, decoding):
            executor.shutdown(wait=True)


def _load(decoders: Decoders, key: bytes | None, place: ByteSource, transforms: Sequence[Images]) -> Timed:
    """Return pixels, or (stage, reason) of a failure, for each transform, and the seconds that it took."""
    start = time.monotonic()
    texts = [transform.text if isinstance(transform, Transform) else None for transform in transforms]
    loaded = decoders.load(place, key=key, transforms=texts)
    parts = [_finish(part, transform) for part, transform in zip(loaded, transforms, strict=True)]
    return parts, time.monotonic() - start


def _finish(part: Loaded, transform: Images) -> Loaded:
    if isinstance(part, tuple) or isinstance(transform, Transform):
        return part
    try:
        return transform(Image.fromarray(part)).numpy()
    except DecodeError as exc:
        return "decode", str(exc)

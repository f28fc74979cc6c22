"""image_batches: files to full batches, decoded in processes of their own, in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from PIL import Image

from embedpipe.errors import DecodeError
from embedpipe.images._isolation import Decoders
from embedpipe.images._transform import Transform

if TYPE_CHECKING:
    import torch

Key = TypeVar("Key", bound=bytes | None)


@dataclass(frozen=True)
class Batch(Generic[Key]):
    """Images that could be read, and what went wrong since the batch before.

    Parameters
    ----------
    images : float32 (n, 3, H, W)              n = 0 where only failures are left to tell
    keys : n keys                              as the items gave them
    failures : list of (key, stage, reason)    "read" and "limit" may pass next time, "decode" never will
    """

    images: torch.Tensor
    keys: list[Key]
    failures: list[tuple[Key, str, str]]


def image_batches(
    items: Iterable[tuple[Key, Path]],
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    batch_size: int,
    workers: int,
) -> Iterator[Batch[Key]]:
    """Read, check, decode and transform files, `workers` at a time; every batch but the last is full.

    Parameters
    ----------
    items : iterable of (key, path)    a file whose sha256 is not its key fails; None: no check
    transform : callable               RGB image -> float32 (3, H, W); its errors are raised
    batch_size, workers : int >= 1     at most 2 * batch_size + workers images are held at a time
    """
    keys, tensors, failures = [], [], []
    for key, loaded in _in_order(items, transform, window=batch_size + workers, workers=workers):
        if isinstance(loaded, tuple):
            failures.append((key, *loaded))
            continue
        keys.append(key)
        tensors.append(loaded)
        if len(tensors) == batch_size:
            yield Batch(_stack(tensors), keys, failures)
            keys, tensors, failures = [], [], []
    if tensors or failures:
        yield Batch(_stack(tensors), keys, failures)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(tensors) if tensors else torch.empty((0, 3, 0, 0))


def _in_order(
    items: Iterable[tuple[Key, Path]], transform: Callable[[Image.Image], torch.Tensor], *, window: int, workers: int
) -> Iterator[tuple[Key, torch.Tensor | tuple[str, str]]]:
    """Yield keys and results in the order of the items, with at most `window` under way."""
    remaining = iter(items)
    under_way: deque[tuple[Key, Future[torch.Tensor | tuple[str, str]]]] = deque()
    executor, decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode"), Decoders()
    try:
        while True:
            for key, path in islice(remaining, window - len(under_way)):
                under_way.append((key, executor.submit(_load, decoders, key, path, transform)))
            if not under_way:
                return
            key, future = under_way.popleft()
            yield key, future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        decoders.give_up()
        executor.shutdown(wait=True)


def _load(
    decoders: Decoders, key: bytes | None, path: Path, transform: Callable[[Image.Image], torch.Tensor]
) -> torch.Tensor | tuple[str, str]:
    """Return the tensor of a file, or (stage, reason) of its failure; a decoder process does the dangerous part."""
    own = transform if isinstance(transform, Transform) else None
    loaded = decoders.load(path, key=key, transform=own.to_dict() if own else None)
    if isinstance(loaded, tuple):
        return loaded
    try:
        return own.normalise(loaded) if own else transform(Image.fromarray(loaded))
    except DecodeError as exc:
        return "decode", str(exc)

"""Runner and stream_rows: compute the features of several backbones while the next images are decoded.

>>> runner = Runner([backbone], settings)
>>> for rows in stream_rows(items, runner):
...     rows.keys, rows.features
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from embedpipe.data import ByteSource
from embedpipe.images import ALL, LIMITS, Batch, Limits, Transform, image_batches
from embedpipe.inference._openvino import OpenVino
from embedpipe.inference._settings import InferenceSettings, torch_threads

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone, SharedModel

Item = tuple[bytes, ByteSource | Path]  # key and place of an image
RECENT_CALLS = 512  # whose speed is remembered


class Executor(Protocol):
    """Runs images through models; safe to call from several threads."""

    def __call__(self, shared_model: int, images: np.ndarray) -> list[np.ndarray]:
        """Return float32 (n, D) for each feature of one of the shared models.

        Raises
        ------
        MemoryError    the device cannot hold a batch of this size
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Features of one batch from one backbone.

    backbone : int                     index into the runner's backbones
    keys : list of bytes               (n)
    features : float32|float16 (n, D)
    failures : list                    of (key, stage, reason)
    """

    backbone: int
    keys: list[bytes]
    features: np.ndarray
    failures: list[tuple[bytes, str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys) + len(self.failures)


class Runner:
    """Computes the features of several backbones; images are decoded once, and a model that backbones share runs once.

    Parameters
    ----------
    session : Executor    instead of the one that `settings` names; its shared models are those of `backbones.join`

    Attributes
    ----------
    windows : list       the distinct transforms that decoders apply; `__call__` takes an array of images for each
    decode_s, forward_s : float    seconds in decoders and in the executor so far, summed over threads
    image_s : deque      seconds per image of the last calls
    difference : float   from eager torch, of the largest feature, if another executor was compared with it
    """

    def __init__(
        self, backbones: Sequence[Backbone], settings: InferenceSettings, *, session: Executor | None = None
    ) -> None:
        from embedpipe.backbones import join

        self.backbones, self.settings = list(backbones), settings
        self.image_s: deque[float] = deque(maxlen=RECENT_CALLS)
        self.decode_s = self.forward_s = self.difference = 0.0
        self.shared_models, self._model_of = join(backbones)
        transforms = [backbone.transform for backbone in backbones]  # decoders do not normalise, the device does
        windows = [one.geometry if isinstance(one, Transform) else one for one in transforms]
        self.windows = list(dict.fromkeys(windows))
        self._window = [self.windows.index(window) for window in windows]
        self._lock, self._explaining, self._parts = threading.Lock(), threading.Lock(), 1
        self.session = session or open_executor(self.shared_models, settings)

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float32 (n, D) for each backbone, from one array of n images for each window; n is a multiple of the batch size.

        Raises
        ------
        MemoryError    the device cannot hold one image
        """
        start = time.monotonic()
        passes = dict.fromkeys(zip(self._model_of, self._window, strict=True))
        features = {(model, window): self._in_parts(model, images[window]) for model, window in passes}
        with self._lock:
            self.forward_s += time.monotonic() - start
            self.image_s.append((time.monotonic() - start) / len(images[0]))
        return [
            features[model, window][self.shared_models[model].output_of(backbone)]
            for backbone, model, window in zip(self.backbones, self._model_of, self._window, strict=True)
        ]

    def _in_parts(self, shared_model: int, images: np.ndarray) -> list[np.ndarray]:
        """Run one batch after another, each in as few parts as the device can hold; batches that were halved stay halved."""
        size, parts = self.settings.batch_size, self._parts
        try:
            cuts = range(0, len(images), -(-size // parts))
            done = [self.session(shared_model, images[cut : cut + cuts.step]) for cut in cuts]
        except MemoryError:
            if parts >= size:
                raise
            self._parts = 2 * parts
            return self._in_parts(shared_model, images)
        return done[0] if len(done) == 1 else [np.concatenate(features) for features in zip(*done, strict=True)]

    def examples(self) -> list[np.ndarray]:
        """Return a batch of black images for each window."""
        of = [self._model_of[self._window.index(window)] for window in range(len(self.windows))]
        return [self.shared_models[shared_model].example(self.settings.batch_size).numpy() for shared_model in of]

    def pad(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Append black images to those of each window, up to whole batches: the bits of a row depend on the size of its batch."""
        short = -len(images[0]) % self.settings.batch_size
        if not short:
            return list(images)
        return [np.concatenate([one, np.zeros((short, *one.shape[1:]), one.dtype)]) for one in images]

    def rows_of(self, batch: Batch[bytes]) -> list[Rows]:
        """Return the rows of each backbone in the stored dtype; rows that are not finite become failures."""
        with self._lock:
            self.decode_s += batch.decode_s
        padded = self.pad(batch.images) if batch.keys else []
        features = self(padded) if padded else [np.empty((0, b.feature_dim), np.float32) for b in self.backbones]
        return [self._rows(n, batch, padded, part) for n, part in enumerate(features)]

    def _rows(self, number: int, batch: Batch[bytes], padded: Sequence[np.ndarray], features: np.ndarray) -> Rows:
        window = self._window[number]
        failures = [(f.key, f.stage, f.reason) for f in batch.failures if f.transform in (ALL, window)]
        failed = {key for key, _, _ in failures}
        with np.errstate(over="ignore"):
            stored = features[: len(batch)].astype(self.settings.store_dtype)
        finite = np.isfinite(stored).all(axis=1)
        good = [row for row, key in enumerate(batch.keys) if key not in failed and finite[row]]
        broken = [row for row, key in enumerate(batch.keys) if key not in failed and not finite[row]]
        if broken:
            reasons = self._explain(number, padded)
            failures += [(batch.keys[row], "forward", reasons[row]) for row in broken]
        return Rows(number, [batch.keys[row] for row in good], stored[good], failures)

    def _explain(self, number: int, images: Sequence[np.ndarray]) -> list[str]:
        """Return why the features of each image are not finite: the first layer with such an output, or the stored dtype."""
        from embedpipe.inference._torch import Torch

        shared_model, batch = self.shared_models[self._model_of[number]], images[self._window[number]]
        with self._explaining:
            copied = copy.deepcopy(shared_model)  # other threads compute with the model itself
            run = partial(Torch([copied], self.settings.under("eager"), folded=False), 0, batch)
            faults = find_faults(copied, run, len(batch))
        return [self._reason(faults.get(row)) for row in range(len(batch))]

    def _reason(self, layer: str | None) -> str:
        precision, stored = self.settings.precision, self.settings.store_dtype
        if layer is None:
            return f"a feature is too large for {stored}; try --store-dtype float32"
        hint = "are the weights damaged?" if precision == "fp32" else "try --precision fp32"
        return f"the output of layer {layer!r} is not finite in {precision}; {hint}"


def stream_rows(items: Iterable[Item], runner: Runner, limits: Limits = LIMITS) -> Iterator[Rows]:
    """Decode images and compute their features, a few batches at a time, in the order in which they are ready.

    Yields
    ------
    Rows    of at most `settings.handed` images from one backbone, for each backbone in turn
    """
    settings = runner.settings
    batches: Any = image_batches(
        items, runner.windows, batch_size=settings.handed, workers=settings.workers, in_order=False, limits=limits
    )
    pending: deque[Future[list[Rows]]] = deque()
    threads = ThreadPoolExecutor(settings.streams, thread_name_prefix="forward")
    with torch_threads(settings.threads):
        try:
            for batch in batches:
                pending.append(threads.submit(runner.rows_of, batch))
                while pending and (pending[0].done() or len(pending) > 2 * settings.streams):
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            batches.close()
            threads.shutdown(wait=True, cancel_futures=True)


def open_executor(shared_models: Sequence[SharedModel], settings: InferenceSettings) -> Executor:
    """Return the executor that `settings` names."""
    from embedpipe.inference._torch import Torch

    executors: dict[str, Callable[..., Executor]] = {"eager": Torch, "compile": Torch, "openvino": OpenVino}
    return executors[settings.executor](shared_models, settings)


def find_faults(shared_model: SharedModel, run: Callable[[], object], size: int) -> dict[int, str]:
    """Run a batch of `size` images; return the first layer whose output is not finite, by the index of the image."""
    import torch

    faults: dict[int, str] = {}

    def note(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, torch.Tensor) and first.shape[:1] == (size,):
            bad = ~first.isfinite().flatten(1).all(dim=1) if first.ndim > 1 else ~first.isfinite()
            for row in bad.nonzero().flatten().tolist():
                faults.setdefault(row, name)

    with ExitStack() as hooks:
        for name, module in shared_model.extractor.model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        run()
    return faults

"""Images through a backbone: what this machine can do, batch by batch, and which layer is at fault when numbers break.

The pipeline, the classifier and the deeds enter here. torch is imported when the first batch is about to run.

>>> forward = plan_forward(device="auto", batch_size="auto", workers="auto")
>>> for rows in stream_rows(items, backbone, forward): ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.errors import UsageError
from embedpipe.images import image_batches

if TYPE_CHECKING:
    import torch

    from embedpipe.backbones import Backbone

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Forward:
    """How images go through a backbone. Precision and stored dtype shape a feature; the rest does not.

    batch_size : int      images a batch; the last one is padded, so that no row depends on its place
    workers : int         decoding threads
    threads : int         threads of one forward pass on a CPU
    channels_last : bool  memory format of images and weights
    """

    device: str = "cpu"
    precision: str = "fp32"
    store_dtype: str = "float32"
    batch_size: int = 32
    workers: int = 2
    threads: int = 0
    channels_last: bool = True

    @property
    def pins(self) -> dict[str, Any]:
        """What must not change until an extraction is complete, for the same bits."""
        return {
            "executor": "eager",
            "batch_size": self.batch_size,
            "threads": self.threads,
            "channels_last": self.channels_last,
        }

    def pinned(self, pins: Mapping[str, Any]) -> Forward:
        """Return these settings under the pins of an extraction that was interrupted."""
        return replace(self, **{name: pins[name] for name in self.pins if name != "executor"})


@dataclass(frozen=True)
class Rows:
    """Features of one batch.

    keys : list of bytes               (n)
    features : float32|float16 (n, D)
    failures : list                    (key, stage, reason) each
    waited_s, forward_s : float        seconds spent waiting for decoded images, and in the backbone
    """

    keys: list[bytes]
    features: np.ndarray
    failures: list[tuple[bytes, str, str]]
    waited_s: float = 0.0
    forward_s: float = 0.0

    def __len__(self) -> int:
        return len(self.keys) + len(self.failures)


def plan_forward(
    *, device: str, batch_size: int | str, workers: int | str, precision: str = "fp32", store_dtype: str = "float32"
) -> Forward:
    """Turn what a user asked for into settings of this machine.

    Raises
    ------
    UsageError    the device is not there (there is no silent fall-back), or a number is below 1
    """
    device = resolve_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, value in (("batch-size", batch_size), ("workers", workers)):
        if value != "auto" and int(value) < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more")
    import torch

    return Forward(
        device=device,
        precision=precision,
        store_dtype=store_dtype,
        batch_size=(32 if device == "cpu" else 128) if batch_size == "auto" else int(batch_size),
        workers=cores if workers == "auto" else int(workers),
        threads=torch.get_num_threads(),
    )


def resolve_device(device: str) -> str:
    """Return the device to use: `auto` means the first of cuda, mps, cpu that is there.

    Raises
    ------
    UsageError    it is not there
    """
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count())), *there]
    if device == "auto":
        return there[0]
    if device not in there:
        raise UsageError(f"--device {device} is not there; found {', '.join(there)}", hint="use --device auto")
    return device


def stream_rows(items: Iterable[tuple[bytes, Path]], backbone: Backbone, forward: Forward) -> Iterator[Rows]:
    """Decode and forward images batch by batch, in the order given.

    Yields
    ------
    Rows    of at most `forward.batch_size` images; rows that are not finite are failures, stage `forward`
    """
    run = Runner(backbone, forward)
    start = time.monotonic()
    for batch in image_batches(items, backbone.transform, batch_size=forward.batch_size, workers=forward.workers):
        decoded = time.monotonic()
        keys, features, failures = _take_finite(run, batch.images, batch.keys)
        waited_s, start = decoded - start, time.monotonic()
        yield Rows(keys, features, [*batch.failures, *failures], waited_s, start - decoded)
        start = time.monotonic()


def _take_finite(
    run: Runner, images: torch.Tensor, keys: list[bytes]
) -> tuple[list[bytes], np.ndarray, list[tuple[bytes, str, str]]]:
    """Return keys and features, in the stored dtype, of the images whose features are finite, and why others have none."""
    if not keys:
        return [], np.empty((0, run.backbone.feature_dim), run.forward.store_dtype), []
    padded = _pad(images, run.forward.batch_size)
    with np.errstate(over="ignore"):
        features = run(padded)[: len(keys)].astype(run.forward.store_dtype)
    finite = np.isfinite(features).all(axis=1)
    if finite.all():
        return keys, features, []
    reasons = run.explain(padded)
    failures = [(keys[row], "forward", reasons[row]) for row in np.flatnonzero(~finite).tolist()]
    return [keys[row] for row in np.flatnonzero(finite).tolist()], features[finite], failures


def _pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """Fill a batch up to its full size with black images: a row's bits depend on the size of its batch."""
    import torch

    if len(images) == size:
        return images
    return torch.cat([images, images.new_zeros(size - len(images), *images.shape[1:])])


class Runner:
    """Images float32 (N, 3, H, W) to features float32 (N, D) on the device and in the precision of `forward`."""

    def __init__(self, backbone: Backbone, forward: Forward) -> None:
        import torch

        if forward.threads:
            torch.set_num_threads(forward.threads)
        self.backbone, self.forward = backbone, forward
        self._memory = torch.channels_last if forward.channels_last else torch.contiguous_format
        self._dtype = getattr(torch, DTYPES[forward.precision])
        self._module = backbone.module.to(forward.device).to(memory_format=self._memory)

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        import torch

        device = self.forward.device
        images = images.to(device, memory_format=self._memory)
        reduced = torch.autocast(device.partition(":")[0], self._dtype, enabled=self._dtype is not torch.float32)
        with torch.inference_mode(), reduced:
            features: np.ndarray = self._module(images).float().cpu().numpy()
        return features

    def explain(self, images: torch.Tensor) -> list[str]:
        """Return for each image why its features are not finite: the first layer at fault, or the stored dtype."""
        import torch

        faults: dict[int, str] = {}

        def note(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if isinstance(first, torch.Tensor) and first.shape[:1] == images.shape[:1]:
                bad = ~first.isfinite().flatten(1).all(dim=1) if first.ndim > 1 else ~first.isfinite()
                for row in bad.nonzero().flatten().tolist():
                    faults.setdefault(row, name)

        def hook(name: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: note(name, output)

        named = [(name, module) for name, module in self.backbone.module.model.named_modules() if name]
        handles = [module.register_forward_hook(hook(name)) for name, module in named]
        try:
            self(images)
        finally:
            for handle in handles:
                handle.remove()
        return [self._reason(faults.get(row)) for row in range(len(images))]

    def _reason(self, layer: str | None) -> str:
        precision, stored = self.forward.precision, self.forward.store_dtype
        if layer is None:
            return f"a feature is too large for {stored}; try --store-dtype float32"
        hint = "are the weights damaged?" if precision == "fp32" else "try --precision fp32"
        return f"the output of layer {layer!r} is not finite in {precision}; {hint}"

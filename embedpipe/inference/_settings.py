"""Settings of inference on this machine: device, precision, executor, batch size, processes and threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedpipe.errors import UsageError
from embedpipe.images import start_decoders

FIRST_BATCH = 64  # on a GPU, before the best size is found
# a small batch stays in the caches of a core: a fifth faster than 32
CPU_BATCH = {"eager": 4, "openvino": 2, "compile": 4}
PINS = ("executor", "batch_size", "threads", "channels_last")
LOAD = 8  # images that decoders return together if batches are smaller: each transfer takes half a millisecond
MOST_STREAMS = 8  # each holds the activations of a batch


@dataclass(frozen=True)
class InferenceSettings:
    """How features are computed. Only precision and stored dtype are part of the identity of a feature.

    executor : str        "eager", "compile" or "openvino"; "auto" until one is chosen
    batch_size : int      images a batch, the last of which is padded; 0 until it is chosen
    load : int            images that decoders return together if batches are smaller
    workers : int         decoding processes
    streams : int         batches that are computed at the same time
    threads : int         threads of one forward pass on a CPU
    channels_last : bool  memory format of images and weights
    graphs : Path or None    folder of the converted graphs and of the measurements of executors; None: nothing is stored
    """

    device: str = "cpu"
    precision: str = "fp32"
    store_dtype: str = "float32"
    executor: str = "eager"
    batch_size: int = CPU_BATCH["eager"]
    load: int = 1
    workers: int = 2
    streams: int = 1
    threads: int = 1
    channels_last: bool = True
    graphs: Path | None = None

    @property
    def handed(self) -> int:
        """Number of images that decoders return together, a multiple of the batch size."""
        return max(1, self.load // self.batch_size) * self.batch_size

    @property
    def pins(self) -> dict[str, Any]:
        """Settings that stay the same until an extraction is complete, so that all its rows have the same bits."""
        return {name: getattr(self, name) for name in PINS}

    @property
    def definite(self) -> InferenceSettings:
        """These settings with eager for "auto" and the usual batch size for 0."""
        return self.under("eager" if self.executor == "auto" else self.executor)

    def under(self, executor: str) -> InferenceSettings:
        """Return these settings with an executor and, if the batch size is 0, its usual one."""
        usual = CPU_BATCH[executor] if self.device == "cpu" else FIRST_BATCH
        return replace(self, executor=executor, batch_size=self.batch_size or usual)

    def pinned(self, pins: Mapping[str, Any]) -> InferenceSettings:
        """Return these settings under the pins of an extraction that was interrupted."""
        return replace(self, **{name: pins[name] for name in PINS})


def resolve_settings(
    *,
    device: str,
    batch_size: int | str,
    workers: int | str,
    precision: str = "fp32",
    store_dtype: str = "float32",
    executor: str = "auto",
) -> InferenceSettings:
    """Return the settings of this machine for the arguments of a command.

    On a CPU every core has a decoding process and a stream of one thread; the bounded queue between them balances both.

    Raises
    ------
    UsageError    the device is not available, or a number is below 1
    """
    device = resolve_device(device)
    for name, value in (("batch-size", batch_size), ("workers", workers)):
        if value != "auto" and int(value) < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more")
    cores, on_cpu = count_cores(), device == "cpu"
    streams = min(cores, MOST_STREAMS) if on_cpu else 2
    return InferenceSettings(
        device=device,
        precision=precision,
        store_dtype=store_dtype,
        executor=executor,
        batch_size=0 if batch_size == "auto" else int(batch_size),
        load=LOAD if batch_size == "auto" else 1,
        workers=cores if workers == "auto" else int(workers),
        streams=streams,
        threads=cores // streams if on_cpu else 1,
    )


def begin_decoding(workers: int | str, images: int) -> None:
    """Start the decoding processes, so that they load while the model does."""
    count = count_cores() if workers == "auto" else min(int(workers), count_cores())
    start_decoders(min(count, images), images)


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: str) -> str:
    """Return the device to use; `auto` is the first of cuda, mps and cpu that is available.

    Raises
    ------
    UsageError    the device is not available
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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of threads of one forward pass on a CPU, and restore it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Forward: how images go through backbones on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from embedpipe.errors import UsageError
from embedpipe.images import start_decoders

FIRST_BATCH = 64  # on a device, before the best size is found
# small ones stay in the caches of a core: a fifth faster than 32
CPU_BATCH = {"eager": 4, "openvino": 2, "compile": 4}
LOAD = 8  # images that are handed on together where batches are smaller: each time costs half a millisecond
MOST_STREAMS = 8  # each holds the activations of a batch


@dataclass(frozen=True)
class Forward:
    """How images go through a backbone. Precision and stored dtype shape a feature; the rest does not.

    executor : str        "eager", "compile" or "openvino"; "auto" until `settle` has chosen
    batch_size : int      images a batch; the last one is padded, so that no row depends on its place; 0 until `settle`
                          knows how many suit the executor and the device
    load : int            images that are handed on together where batches are smaller
    workers : int         decoding processes
    streams : int         batches in the backbone at a time
    threads : int         threads of one forward pass on a CPU
    channels_last : bool  memory format of images and weights
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

    @property
    def handed(self) -> int:
        """How many images are handed from decoders to the backbones together."""
        return max(1, self.load // self.batch_size) * self.batch_size

    @property
    def pins(self) -> dict[str, Any]:
        """What must not change until an extraction is complete, for the same bits."""
        return {
            "executor": self.executor,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "channels_last": self.channels_last,
        }

    @property
    def definite(self) -> Forward:
        """These settings without anything left to choose: eager, in batches that any device takes."""
        return self.under("eager" if self.executor == "auto" else self.executor)

    def under(self, executor: str) -> Forward:
        """These settings with an executor, and where the batch size is open, one that suits it."""
        usual = CPU_BATCH[executor] if self.device == "cpu" else FIRST_BATCH
        return replace(self, executor=executor, batch_size=self.batch_size or usual)

    def pinned(self, pins: Mapping[str, Any]) -> Forward:
        """Return these settings under the pins of an extraction that was interrupted."""
        return replace(self, **{name: pins[name] for name in self.pins})


def plan_forward(
    *,
    device: str,
    batch_size: int | str,
    workers: int | str,
    precision: str = "fp32",
    store_dtype: str = "float32",
    executor: str = "auto",
) -> Forward:
    """Turn what a user asked for into settings of this machine.

    On a CPU every core has a decoding process and a forward pass of one thread: the bounded queue between them divides
    the cores as the work demands.

    Raises
    ------
    UsageError    the device is not there (there is no silent fall-back), or a number is below 1
    """
    device = resolve_device(device)
    for name, value in (("batch-size", batch_size), ("workers", workers)):
        if value != "auto" and int(value) < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more")
    cores, on_cpu = count_cores(), device == "cpu"
    streams = min(cores, MOST_STREAMS) if on_cpu else 2
    return Forward(
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
    """Start the decoders for so many images while other things are loaded."""
    wanted = count_cores() if workers == "auto" else int(workers)
    start_decoders(min(wanted, count_cores(), images), images)


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the threads of one forward pass on a CPU, and set them back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

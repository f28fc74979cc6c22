"""Ranks: the processes that torchrun started. Gradients are summed after the backward pass, so that each rank may use
as many micro-batches as its memory requires.

>>> with join_process_group() as ranks:
...     train(..., ranks=ranks)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)  # the other processes wait while the first one validates and saves


@dataclass(frozen=True)
class Ranks:
    """This process: its number `rank` of `count` processes."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one device by their sums over all ranks."""
        if self.count > 1:
            flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.detach().copy_(total.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is True on any rank."""
        flags = torch.tensor([int(flag)])
        self.add([flags])
        return bool(flags)

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return on every rank the result of `make` on the first one."""
        results: list[Any] = [make() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(results, device=torch.device("cpu"))
        result: T = results[0]
        return result


@contextmanager
def join_process_group() -> Iterator[Ranks]:
    """Join the process group if torchrun started this process."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

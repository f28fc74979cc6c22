"""The state of a network that training changes, its running average, random states, and delayed signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay SIGTERM and SIGINT until the block ends, so that it runs completely or not at all."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    received: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: received.append(number)) for n in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


def moving_names(network: nn.Module, keep_eval: Sequence[nn.Module]) -> set[str]:
    """Return the names in the state dict that training may change: trainable parameters, and buffers of modules in train mode."""
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    still = {id(module) for frozen in keep_eval for module in frozen.modules()}
    for prefix, module in network.named_modules():
        if id(module) not in still:
            names |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    return names & set(network.state_dict())


def moving_state(network: nn.Module, keep_eval: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return copies of the tensors that training may change."""
    state = network.state_dict()
    return {name: state[name].clone() for name in sorted(moving_names(network, keep_eval))}


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors of a network in place."""
    network.load_state_dict(dict(tensors), strict=False)


class Average:
    """Exponential moving average of the tensors that training changes; its decay starts low and rises to `decay`."""

    def __init__(self, tensors: dict[str, Tensor], decay: float) -> None:
        self.tensors, self.decay, self.updates = tensors, decay, 0

    def update(self, network: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        state = network.state_dict()
        for name, average in self.tensors.items():
            if average.is_floating_point():
                average.lerp_(state[name], 1 - decay)
            else:
                average.copy_(state[name])

    @contextmanager
    def inside(self, network: nn.Module) -> Iterator[None]:
        """Swap the average into the network within the block."""
        state = network.state_dict()
        own = {name: state[name].clone() for name in self.tensors}
        try:
            with delay_signals():
                load_tensors(network, self.tensors)
            yield
        finally:
            with delay_signals():
                load_tensors(network, own)


def random_state() -> dict[str, Any]:
    """Return the state of torch's random number generators, on the CPU and on every cuda device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned; states of cuda devices that this machine lacks are ignored."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])

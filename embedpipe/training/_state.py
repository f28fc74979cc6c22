"""What of a network may move, as tensors by name: taken, put back, averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embedpipe.training._signals import signals_held


def set_modes(network: nn.Module, keep_eval: Sequence[nn.Module]) -> None:
    """Put the network into train mode, and what is frozen into eval mode."""
    network.train()
    for module in keep_eval:
        module.eval()


def moving_names(network: nn.Module, keep_eval: Sequence[nn.Module]) -> set[str]:
    """Return the names in the state dict that training may change: trainable parameters, and buffers in train mode."""
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    still = {id(module) for frozen in keep_eval for module in frozen.modules()}
    for prefix, module in network.named_modules():
        if id(module) not in still:
            names |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    return names & set(network.state_dict())


def moving_state(network: nn.Module, keep_eval: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return copies of what training may change."""
    state = network.state_dict()
    return {name: state[name].clone() for name in sorted(moving_names(network, keep_eval))}


def put(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors of a network in place."""
    network.load_state_dict(dict(tensors), strict=False)


class Average:
    """The running average of what moves; young averages follow faster, so that the start is soon forgotten."""

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
        """Put the average into the network for the time of the block."""
        state = network.state_dict()
        own = {name: state[name].clone() for name in self.tensors}
        try:
            with signals_held():
                put(network, self.tensors)
            yield
        finally:
            with signals_held():
                put(network, own)


def random_state() -> dict[str, Tensor | list[Tensor]]:
    """Return the state of torch's own random numbers, here and on every cuda device."""
    there = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": there}


def set_random_state(state: Mapping[str, Tensor | list[Tensor]]) -> None:
    cpu, there = state["cpu"], state["cuda"]
    assert isinstance(cpu, Tensor)
    torch.set_rng_state(cpu)
    for device, one in enumerate(there[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)

"""What runs when in a model, found by one forward pass on the meta device: no weights are read, nothing is computed.

>>> trace(model, (224, 224)).visits["layer4"].shape
(2, 512, 7, 7)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

BATCH = 2


class Weightless(TorchFunctionMode):
    """Build models inside without memory for their weights: uninitialised tensors go to the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@dataclass
class Visit:
    """One module in a forward pass: when it started first, how often it ran, what it gave last (on the meta device)."""

    first: int
    count: int = 0
    output: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.output is None else tuple(self.output.shape)


@dataclass(frozen=True)
class Trace:
    """A forward pass: the modules that ran, by dotted name in order of their start, and the model's output."""

    visits: Mapping[str, Visit]
    output: Tensor

    def start_of(self, name: str) -> int:
        """Return when a module started; one that is never called itself counts with the caller that holds it."""
        while name not in self.visits:
            name = name.rpartition(".")[0]
        return self.visits[name].first

    def start_below(self, prefix: str) -> int | None:
        """Return when the first module at or below a dotted prefix started, None when none ran."""
        starts = [v.first for n, v in self.visits.items() if is_below(n, prefix)]
        return min(starts, default=None)


def is_below(name: str, prefix: str) -> bool:
    """Tell whether a dotted name is `prefix` or lies under it (everything lies under the empty one)."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in what a module returned (a tuple, a dict, ...)."""
    if isinstance(output, Tensor):
        return output
    parts = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, (tuple, list))
        else ()
    )
    return next((tensor for part in parts if (tensor := first_tensor(part)) is not None), None)


@torch.no_grad()
def trace(model: nn.Module, image_size: tuple[int, int]) -> Trace:
    """Run `model` on the meta device with two images of `image_size` (H, W) and note what its modules do.

    Raises
    ------
    whatever the model raises for images of this size
    """
    visits: dict[str, Visit] = {}
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        visits.setdefault(names[module], Visit(len(visits)))

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        visit = visits[names[module]]
        visit.count, visit.output = visit.count + 1, first_tensor(output)

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ghosts = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    try:
        functional_call(model, ghosts, (torch.empty(BATCH, 3, *image_size, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
    output = visits[""].output
    if output is None:
        raise TypeError(f"{type(model).__name__} returns no tensor")
    return Trace(visits, output)

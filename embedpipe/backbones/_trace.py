"""What runs when in a model, found by one forward pass on the meta device: no weights are read, nothing is computed.

>>> trace(model, (224, 224)).visits["layer4"].shape
(2, 512, 7, 7)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BATCH = 2


class Weightless(TorchFunctionMode):
    """Build models inside without memory for their weights: blank tensors go to the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@dataclass
class Visit:
    """One module in a forward pass: its start, how often it ran, what it took and gave last."""

    first: int
    count: int = 0
    entered: Tensor | None = None
    output: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.output is None else tuple(self.output.shape)


@dataclass(frozen=True)
class Trace:
    """A forward pass: the modules that ran, by name in order of their start, and the output."""

    visits: Mapping[str, Visit]
    output: Tensor
    image_size: tuple[int, int]

    def start_of(self, name: str) -> int:
        """Return when a module started; one never called counts with the caller that holds it."""
        while name not in self.visits:
            name = owner_of(name)
        return self.visits[name].first

    def start_below(self, prefix: str) -> int | None:
        """Return when the first module at or below a dotted prefix started, None when none ran."""
        starts = [v.first for n, v in self.visits.items() if is_below(n, prefix)]
        return min(starts, default=None)


def is_below(name: str, prefix: str) -> bool:
    """Tell whether a dotted name is `prefix` or lies under it; all lie under the empty one."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def owner_of(name: str) -> str:
    """Return the module that holds a parameter or a module."""
    return name.rpartition(".")[0]


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in what a module returned (a tuple, a dict, ...)."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        return None
    return next((tensor for part in output if (tensor := first_tensor(part)) is not None), None)


@torch.no_grad()
def trace(model: nn.Module, image_size: tuple[int, int]) -> Trace:
    """Run `model` on the meta device with two images of `image_size` (H, W).

    Raises
    ------
    whatever the model raises for images of this size
    """
    visits: dict[str, Visit] = {}
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        visits.setdefault(names[module], Visit(len(visits))).entered = first_tensor(inputs)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        visit = visits[names[module]]
        visit.count, visit.output = visit.count + 1, first_tensor(output)

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        with _on_meta(model):
            model(torch.empty(BATCH, 3, *image_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    output = visits[""].output
    if output is None:
        raise TypeError(f"{type(model).__name__} returns no tensor")
    return Trace(visits, output, image_size)


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Put ghosts in the place of all parameters and buffers; shared ones stay shared."""
    tables: list[dict[str, Any]] = []
    for module in model.modules():
        tables += [module._parameters, module._buffers]
    before = [dict(table) for table in tables]
    ghosts: dict[Any, Any] = {None: None}
    for table in before:
        ghosts |= {t: torch.empty_like(t, device="meta") for t in table.values() if t is not None}
    try:
        for table in tables:
            table.update({name: ghosts[tensor] for name, tensor in table.items()})
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)

"""One forward pass of a model on the meta device: which modules run, in which order, on which shapes.

The pass reads no weights and computes no numbers. Every parameter and buffer is replaced by a tensor on PyTorch's meta
device, which has a shape and a dtype but no data, and hooks on all modules record each call.

>>> trace_model(model, (224, 224)).modules["layer4"].shape
(2, 512, 7, 7)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from embedpipe.provenance import nearest

BATCH = 2
FORWARD_ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)  # what models raise on bad shapes


class MetaWeights(TorchFunctionMode):
    """Build models inside this context without memory for their weights: new tensors go to the meta device.

    `torch.device("meta")` would also move the small tensors whose values some constructors read.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@dataclass(eq=False)
class Call:
    """One call of a module. `start` and `end` count events; `end` is infinite if the pass ended inside the call."""

    name: str
    start: int
    inputs: tuple[Any, ...]
    end: float = math.inf
    output: Any = None


@dataclass
class ModuleRecord:
    """One module in a forward pass: its rank by first call, the number of calls, its last input and output."""

    first: int
    count: int = 0
    input: Tensor | None = None
    output: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.output is None else tuple(self.output.shape)


@dataclass(frozen=True)
class Trace:
    """A forward pass: a record of each module that ran, by name and in order of first calls, and the output."""

    modules: Mapping[str, ModuleRecord]
    output: Tensor
    image_size: tuple[int, int]

    def start_of(self, name: str) -> int:
        """Return the rank of a module's first call; for a module that was never called, of the module that holds it."""
        while name not in self.modules:
            name = owner_of(name)
        return self.modules[name].first

    def start_below(self, prefix: str) -> int | None:
        """Return the rank of the first call at or below a dotted prefix, None if nothing there ran."""
        return min((m.first for n, m in self.modules.items() if is_below(n, prefix)), default=None)


def is_below(name: str, prefix: str) -> bool:
    """Return True if a dotted name is `prefix` or lies below it; every name lies below the empty prefix."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def owner_of(name: str) -> str:
    """Return the name of the module that holds a parameter or a module."""
    return name.rpartition(".")[0]


def layer_hint(name: str, known: Iterable[str]) -> str:
    """Return the hint of an error about an unknown layer: the closest known names."""
    close = " or ".join(map(repr, nearest(name, known)))
    return f"did you mean {close}?" if close else "see `embedpipe layers`"


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in nested tuples, lists and dictionaries."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


def trace_model(model: nn.Module, image_size: tuple[int, int]) -> Trace:
    """Run `model` on the meta device with two images of `image_size` (H, W).

    Raises
    ------
    TypeError    the model returns no tensor
    Exception    whatever the model raises for images of this size
    """
    modules: dict[str, ModuleRecord] = {}
    for call in record_calls(model, torch.empty(BATCH, 3, *image_size, device="meta")):
        record = modules.setdefault(call.name, ModuleRecord(len(modules)))
        record.count += 1
        record.input, record.output = first_tensor(call.inputs), first_tensor(call.output)
    output = modules[""].output
    if output is None:
        raise TypeError(f"{type(model).__name__} returns no tensor")
    return Trace(modules, output, image_size)


@torch.no_grad()
def record_calls(model: nn.Module, images: Tensor, *, run: nn.Module | None = None) -> list[Call]:
    """Return the calls of all modules of `model`, in order of their start, in a pass of `run` on the meta device.

    Parameters
    ----------
    images : Tensor (N, 3, H, W)    only its shape and dtype are used
    run : nn.Module                 a module that holds `model`; `model` itself if None
    """
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call] = []
    running: list[Call] = []
    clock = count()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(Call(names[module], next(clock), (*args, *kwargs.values())))
        calls.append(running[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.end, call.output = next(clock), output

    run = model if run is None else run
    tensors = {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in run.named_modules()  # each module once, with all its parameters: some models share both
        for key, tensor in (module._parameters | module._buffers).items()
        if tensor is not None
    }
    meta = {tensor: torch.empty_like(tensor, device="meta") for tensor in tensors.values()}
    state = {name: meta[tensor] for name, tensor in tensors.items()}
    with ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave))
        functional_call(run, state, (torch.empty_like(images, device="meta"),), tie_weights=False)
    return calls

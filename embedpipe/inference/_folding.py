"""Fold batch normalisations into the convolutions before them: in eval mode both are linear.

>>> folded = fold(shared_model)          # the shared_model itself if there is nothing to fold
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from embedpipe.backbones import SharedModel

SHAPES = ("__get__", "size", "dim", "numel")  # functions that only look at a tensor's shape


def fold(shared_model: SharedModel) -> SharedModel:
    """Return a copy of a shared model without the batch normalisations that directly follow a convolution.

    A convolution is left as it is if its output is a requested layer, or has other uses.
    """
    pairs = find_pairs(shared_model)
    if not pairs:
        return shared_model
    folded = copy.deepcopy(shared_model)
    model = folded.extractor.model
    for conv, norm in pairs:
        before: Any = model.get_submodule(conv)
        after: Any = model.get_submodule(norm)
        model.set_submodule(conv, fuse_conv_bn_eval(before, after))
        rest = [part for part in (getattr(after, "drop", None), getattr(after, "act", None)) if part is not None]
        model.set_submodule(norm, nn.Sequential(*rest))  # of timm's norms, which hold the activation
    return folded


def find_pairs(shared_model: SharedModel) -> list[tuple[str, str]]:
    """Return pairs of a convolution and the batch normalisation that alone uses its output, from a pass on black images."""
    model = shared_model.extractor.model
    names = {module: name for name, module in model.named_modules()}
    producers: dict[int, str] = {}  # id of an output -> name of the convolution
    consumers: dict[str, str] = {}
    uses: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    alive: list[Any] = []  # outputs stay alive, so that their ids are unique

    class Uses(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") not in SHAPES:
                uses.update(producers[id(one)] for one in tree_leaves((args, kwargs)) if id(one) in producers)
            return func(*args, **(kwargs or {}))

    def enter(module: nn.Module, inputs: Any) -> None:
        runs[names[module]] += 1
        if is_norm(module) and inputs and id(inputs[0]) in producers:
            consumers[producers[id(inputs[0])]] = names[module]

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if is_conv(module):
            producers[id(output)] = names[module]
        alive.append(output)

    with ExitStack() as hooks, torch.inference_mode(), Uses():
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        shared_model(shared_model.example(1))
    requested = {tap.name for group in shared_model.groups for tap in group}
    return [
        (conv, norm)
        for conv, norm in consumers.items()
        if uses[conv] == 1 and runs[conv] == runs[norm] == 1 and conv not in requested
    ]


def is_conv(module: nn.Module) -> bool:
    """Return True if a module is a convolution of torch, or of timm with padding as in TensorFlow."""
    return type(module).__name__ in ("Conv2d", "Conv2dSame")


def is_norm(module: nn.Module) -> bool:
    """Return True if a module is a batch normalisation with fixed statistics, of torch, or of timm with an activation."""
    known = type(module).__name__ in ("BatchNorm2d", "BatchNormAct2d")
    return isinstance(module, nn.BatchNorm2d) and known and module.running_var is not None and not module.training

"""A model as a feature extractor: which tensor is the feature, and how it becomes one vector per image.

The penultimate features are what enters the classifier. `choose_hooks` finds them in a trace of the model:

* If the classifier is the last module to act on the features, the model without its classifier returns them, and no
  hook is needed.
* Otherwise (an intermediate layer, several classifiers, pooling after a convolutional classifier) forward hooks on the
  named modules catch their outputs, and the pass ends at the last of them.

Feature maps and token sequences are pooled to one vector. Class, register and distillation tokens never enter an
average or a maximum.

>>> FeatureExtractor(model, [FeatureHook("layer3", Pooling("avg", "map"))])(images).shape
torch.Size([8, 256])
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.backbones._trace import BATCH, Trace, first_tensor, layer_hint
from embedpipe.errors import UsageError

POOLS = ("auto", "avg", "cls", "max", "none")
PREFIX_TOKENS = re.compile(r"(cls|class|dist|reg|register)_tokens?_?\d*")


@dataclass(frozen=True)
class Pooling:
    """How an output becomes one vector per image.

    Parameters
    ----------
    kind : "avg", "cls", "max" or "none" (flattened)
    layout : "vector" (N, D), "map" (N, C, H, W), "nhwc" (N, H, W, C) or "tokens" (N, T, C)
    prefix : int    number of class, register and distillation tokens before the patches
    """

    kind: str
    layout: str
    prefix: int = 0

    def __call__(self, output: Tensor) -> Tensor:
        if self.layout == "vector":
            return output
        if self.kind == "none":
            return output.flatten(1)
        tokens = output
        if self.layout == "map":
            tokens = output.flatten(2).transpose(1, 2)
        elif self.layout == "nhwc":
            tokens = output.flatten(1, 2)
        if self.kind == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.prefix :]
        return patches.amax(1) if self.kind == "max" else patches.mean(1)


@dataclass(frozen=True)
class FeatureHook:
    """A hook on the output of a module, or on its input. The module runs `count` times; the last call counts."""

    name: str
    pooling: Pooling
    count: int = 1
    at_input: bool = False


Caught = dict[FeatureHook, list[Tensor]]


class PassThrough(nn.Module):
    """Takes the place of a classifier. Not `nn.Identity`, because some models skip that."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Complete(Exception):
    """All hooks have caught their tensors."""


class FeatureExtractor(nn.Module):
    """images float32 (N, 3, H, W) -> features (N, D).

    Parameters
    ----------
    model : nn.Module    the library's model without its classifiers; its parameters keep their names
    groups : each a sequence of FeatureHook    their pooled vectors are concatenated to a feature; an empty group means
        the output of the model. With several groups, one pass returns a tuple of features.
    stop : bool    end the pass as soon as all hooks have caught their tensors; False to record the pass as a graph
    """

    def __init__(self, model: nn.Module, *groups: Sequence[FeatureHook], stop: bool = True) -> None:
        super().__init__()
        self.model = model
        self.groups = tuple(tuple(group) for group in groups) or ((),)
        self._hooks = tuple(dict.fromkeys(hook for group in self.groups for hook in group))
        self._caught: dict[int, Caught | None] = {}  # by thread, as several may share the module
        for hook in self._hooks:
            module = model.get_submodule(hook.name)
            register: Any = module.register_forward_pre_hook if hook.at_input else module.register_forward_hook
            catch = partial(_catch, self._caught, hook, stop and all(self.groups))
            weakref.finalize(self, register(catch, with_kwargs=True).remove)

    @property
    def hooks(self) -> tuple[FeatureHook, ...]:
        """The hooks of the first feature."""
        return self.groups[0]

    def forward(self, images: Tensor) -> Any:
        caught: Caught = {hook: [] for hook in self._hooks}
        self._collect(caught)
        output = None
        try:
            output = self.model(images)
        except _Complete:
            pass
        finally:
            self._collect(None)
        if missing := [hook.name for hook, tensors in caught.items() if not tensors]:
            raise RuntimeError(f"{missing[0]} did not run for these images")
        features = []
        for group in self.groups:
            vectors = [hook.pooling(caught[hook][-1]) for hook in group]
            if output is not None and not group:
                vectors = [output.flatten(1)]
            features.append(vectors[0] if len(vectors) == 1 else torch.cat(vectors, 1))
        return features[0] if len(features) == 1 else tuple(features)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, the number of a thread would be a dimension
    def _collect(self, caught: Caught | None) -> None:
        """Set what the hooks fill in this thread; None: nothing."""
        self._caught[get_ident()] = caught

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Set the mode of all layers but not of the model itself, whose flag only selects training-time outputs."""
        super().train(mode)
        self.model.training = False
        return self


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _catch(
    by_thread: dict[int, Caught | None], hook: FeatureHook, stop: bool, _: Any, args: Any, kwargs: Any, output: Any = ()
) -> None:
    """Store the tensor of a hook if its extractor runs in this thread."""
    caught = by_thread.get(get_ident())
    if caught is None:
        return
    tensor = first_tensor((*args, *kwargs.values()) if hook.at_input else output)
    assert tensor is not None
    caught[hook].append(tensor.clone() if hook.at_input else tensor)  # the module may write into its input
    if stop and all(len(tensors) == one.count for one, tensors in caught.items()):
        raise _Complete


def choose_hooks(
    model: nn.Module, trace: Trace, *, heads: Sequence[str], layer: str | None, pool: str, name: str
) -> list[FeatureHook]:
    """Return the hooks whose pooled vectors make the feature; none if the model's output is the feature.

    Raises
    ------
    UsageError    unknown layer or pool, or an output that cannot be pooled to a vector
    """
    if pool not in POOLS:
        raise UsageError(f"no pool {pool!r}", hint=f"use one of {', '.join(POOLS)}")
    if layer is not None:
        modules = [known for known, _ in model.named_modules() if known]
        if layer not in modules:
            raise UsageError(f"no layer {layer!r} in {name}", hint=layer_hint(layer, modules))
        if layer not in trace.modules or trace.modules[layer].output is None:
            raise UsageError(f"layer {layer!r} of {name} returns no tensor", hint="name a module inside it")
        return [_make_hook(model, trace, layer, pool=pool, name=name)]
    points = [head for head in heads if head in trace.modules] or [""]
    hooks = [_make_hook(model, trace, point, pool=pool, name=name) for point in points]
    return [] if len(hooks) == 1 and is_same(trace.output, trace.modules[points[0]].output) else hooks


def _make_hook(model: nn.Module, trace: Trace, point: str, *, pool: str, name: str) -> FeatureHook:
    record, where = trace.modules[point], f"{point or 'the output'} of {name}"
    layout = layout_of(record.shape, trace.image_size, channels_last=getattr(model, "output_fmt", "") == "NHWC")
    if record.shape[:1] != (BATCH,) or (layout == "unknown" and pool != "none"):
        expected = "a vector, tokens or a map of each image"
        message = f"{where} has the shape {record.shape} for {BATCH} images, expected {expected}"
        raise UsageError(message, hint="name the block that holds this layer, or use --pool none")
    tokens = record.shape[1] if layout == "tokens" else 0
    prefix = count_prefix(tokens, trace.image_size, _declared_prefix(model)) if tokens else 0
    if pool == "cls" and not prefix:
        raise UsageError(f"{where} has no class token", hint="use --pool avg")
    kind = "none" if layout == "vector" else "avg" if pool == "auto" else pool
    return FeatureHook(point, Pooling(kind, layout, prefix), record.count)


def is_same(output: Tensor, tensor: Tensor | None) -> bool:
    """Return True if a model's output (N, D) is the tensor that a module returned, at most flattened."""
    if tensor is None or output.ndim != 2 or tensor.numel() != output.numel():
        return False
    same_memory = output.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    return output is tensor or (same_memory and tensor.shape[:2] == output.shape)


def _declared_prefix(model: nn.Module) -> int:
    """Return the number of class, distillation and register tokens that a model declares."""
    declared = getattr(model, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if (match := PREFIX_TOKENS.fullmatch(name)) and parameter.ndim > 1:
            counts[match[1]] = max(parameter.shape[-2], counts.get(match[1], 0))  # one set per stage
    return sum(counts.values())


def layout_of(shape: Sequence[int], image_size: tuple[int, int], *, channels_last: bool = False) -> str:
    """Return the layout of an output (N, ...) for images (H, W); `channels_last` decides where the shape cannot.

    A map has the aspect ratio of the image in its last two axes, an NHWC map in the two axes before the last.
    """
    if len(shape) == 4:
        aspect = math.log(image_size[0] / image_size[1])
        last = abs(math.log(shape[2] / shape[3]) - aspect)
        first = abs(math.log(shape[1] / shape[2]) - aspect)
        return "nhwc" if first < last or (first == last and channels_last) else "map"
    return {2: "vector", 3: "tokens"}.get(len(shape), "unknown")


def count_prefix(tokens: int, image_size: tuple[int, int], declared: int) -> int:
    """Return how many of `tokens` come before the patches: `declared` if the others form a grid, else none."""

    def is_grid(count: int) -> bool:
        height = round(math.sqrt(count * image_size[0] / image_size[1]))
        width = round(math.sqrt(count * image_size[1] / image_size[0]))
        return count > 0 and height * width == count

    if is_grid(tokens - declared) or (tokens > declared and not is_grid(tokens)):
        return declared
    return 0

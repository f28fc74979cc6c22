"""The nouns of the room: `Backbone`, `Layer`, and the stages of a model in the order in which they run.

>>> [layer.name for layer in backbone.layers]
['conv1', 'layer1', 'layer2', 'layer3', 'layer4']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedpipe.backbones._cut import Cut, cut
from embedpipe.backbones._headless import Headless
from embedpipe.backbones._trace import Trace
from embedpipe.provenance import digest_arrays

STAGES_WANTED = 4


@dataclass(frozen=True)
class Layer:
    """A stage of a model: dotted name, number of parameters, shape of its output without the batch axis."""

    name: str
    parameters: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model without its classifier, and everything that shapes a feature of it.

    Parameters
    ----------
    name : str              "timm:resnet18"
    module : Headless       images float32 (N, 3, H, W) -> features (N, D); eval mode, no gradients
    transform : callable    RGB image -> float32 (3, H, W); an `images.Transform` unless the user
        brought another
    feature_dim : int       D
    spec : dict             JSON-able: all that shapes a feature but precision and stored dtype
    origin : str            where the weights came from; recorded, never hashed
    trace : Trace           what runs when in the model
    heads : tuple of str    where the classifiers stood
    build : dict            arguments of the library's builder that made this model
    files : tuple of Path   the files that its weights were read from; None where that is not known
    """

    name: str
    module: Headless
    transform: Callable[[Any], torch.Tensor]
    feature_dim: int
    spec: dict[str, Any]
    origin: str
    trace: Trace = field(repr=False)
    heads: tuple[str, ...] = ()
    build: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that the model was checked with."""
        return self.trace.image_size

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The stages in the order in which they run."""
        return find_stages(self.module.model, self.trace)

    def cut(self, layer: str) -> Cut:
        """Return the part before a layer and the part from it on; see `_cut.cut`."""
        return cut(self, layer)


def refresh(backbone: Backbone, origin: str) -> Backbone:
    """Return the backbone with its present weights in the spec, frozen again: what fine-tuning ends with."""
    backbone.module.eval().requires_grad_(False)
    spec = {**backbone.spec, "weights": digest_weights(backbone.module.model)}
    return replace(backbone, spec=spec, origin=origin)


def digest_weights(model: nn.Module) -> str:
    """Return the digest of all parameters and buffers that the library stores; the classifier is gone by now."""
    return digest_arrays({name: value for name, value in model.state_dict().items() if hasattr(value, "detach")})


def find_stages(model: nn.Module, record: Trace) -> tuple[Layer, ...]:
    """Cut a model into stages: its largest composite module is opened until four of them stand side by side.

    Modules without a weight matrix or kernel (norms, activations, pools) belong to the stage before them.
    """
    modules = dict(model.named_modules())
    names = _children(modules, record, "")
    while parts := {name: inside for name in names if (inside := _children(modules, record, name))}:
        silent = [name for name in parts if name not in record.visits]  # a ModuleList has no output
        if len(parts) >= STAGES_WANTED and not silent:
            break
        largest = max(silent or parts, key=lambda name: _count(modules[name]))
        names = [n for name in names for n in (parts[name] if name == largest else [name])]
    ordered = sorted((name for name in names if name in record.visits), key=record.start_of)
    return tuple(Layer(n, _count(modules[n]), record.visits[n].shape[1:]) for n in ordered)


def _children(modules: dict[str, nn.Module], record: Trace, prefix: str) -> list[str]:
    """Return the child modules that run and hold a weight matrix or kernel."""
    names = [f"{prefix}.{name}".lstrip(".") for name, _ in modules[prefix].named_children()]
    return [n for n in names if n in modules and record.start_below(n) is not None and _has_kernel(modules[n])]


def _has_kernel(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""A model without its classifier: images in, one vector an image out, the library's own parameter names kept.

Two ways, chosen once when the model is loaded. Where the classifier was the last thing to act on the features, the
model's own output is the feature, and nothing else happens. Elsewhere (an intermediate layer, several heads, a pooling
after a convolutional classifier) the outputs of named modules are caught and the pass ends there.

>>> Headless(model, [Tap("layer3", Pooling("avg", "map"))])(images).shape
torch.Size([8, 256])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.backbones._trace import first_tensor


@dataclass(frozen=True)
class Pooling:
    """How one vector an image comes from an output.

    Parameters
    ----------
    kind : "avg", "cls", "max" or "none" (flattened)
    layout : "vector" (N, D), "map" (N, C, H, W), "nhwc" (N, H, W, C) or "tokens" (N, T, C)
    prefix : int    class, register and distillation tokens in front, which never enter an average
        or a maximum
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
class Tap:
    """A module whose output is wanted, or its input; it runs `count` times a pass, the last time counts."""

    name: str
    pooling: Pooling
    count: int = 1
    entered: bool = False


class PassThrough(nn.Module):
    """Stands where a classifier stood. No `nn.Identity`: some models skip theirs."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Reached(Exception):
    pass


class Headless(nn.Module):
    """Images float32 (N, 3, H, W) -> features (N, D): `model` without its classifier, tapped where need be.

    Parameters
    ----------
    model : nn.Module    the library's model; without its classifiers
    groups : each a sequence of Tap    modules whose pooled outputs are concatenated; empty = the
        model's output is the feature. Several groups: one pass gives a tuple of features.
    stop : bool    end the pass with the last tap; False for what records the whole pass as a graph
    """

    def __init__(self, model: nn.Module, *groups: Sequence[Tap], stop: bool = True) -> None:
        super().__init__()
        self.model = model
        self.groups = tuple(tuple(group) for group in groups) or ((),)
        self._taps = tuple(dict.fromkeys(tap for group in self.groups for tap in group))
        self._whole = not (stop and all(self.groups))
        self._caught: dict[int, dict[Tap, list[Tensor]]] = {}  # per thread, as one module serves several
        for tap in self._taps:
            module = model.get_submodule(tap.name)
            if tap.entered:
                module.register_forward_pre_hook(partial(self._catch_input, tap), with_kwargs=True)
            else:
                module.register_forward_hook(partial(self._catch, tap))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps of the first feature."""
        return self.groups[0]

    def forward(self, images: Tensor) -> Any:
        caught: dict[Tap, list[Tensor]] = {tap: [] for tap in self._taps}
        self._caught[get_ident()] = caught
        output = None
        try:
            output = self.model(images)
        except _Reached:
            pass
        finally:
            del self._caught[get_ident()]
        features = []
        for group in self.groups:
            vectors = [tap.pooling(caught[tap][-1]) for tap in group]
            if output is not None and not group:
                vectors = [output.flatten(1)]
            features.append(vectors[0] if len(vectors) == 1 else torch.cat(vectors, 1))
        return features[0] if len(features) == 1 else tuple(features)

    def train(self, mode: bool = True) -> Headless:
        """Switch the layers, never the root's own flag: there it only selects training-time outputs."""
        super().train(mode)
        self.model.training = False
        return self

    def _catch_input(self, tap: Tap, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor((*args, *kwargs.values()))
        self._catch(tap, module, None, None if tensor is None else tensor.clone())  # what follows may write into it

    def _catch(self, tap: Tap, module: nn.Module, inputs: Any, output: Any) -> None:
        caught = self._caught.get(get_ident())
        if caught is None:
            return
        tensor = first_tensor(output)
        assert tensor is not None
        caught[tap].append(tensor)
        if not self._whole and all(len(caught[tap]) == tap.count for tap in self._taps):
            raise _Reached

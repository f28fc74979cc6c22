"""A model without its classifier: images in, one vector an image out, the library's own parameter
names kept.

Two ways, chosen once when the model is loaded. Where the classifier was the last thing to act on
the features, the model's own output is the feature, and nothing else happens. Elsewhere (an
intermediate layer, several heads, a pooling after a convolutional classifier) the outputs of named
modules are caught and the pass ends
there.

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
    """A module whose output is wanted; it runs `count` times a pass, the last output counts."""

    name: str
    pooling: Pooling
    count: int = 1


class PassThrough(nn.Module):
    """Stands where a classifier stood. No `nn.Identity`: some models skip theirs."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Reached(Exception):
    pass


class Headless(nn.Module):
    """Images float32 (N, 3, H, W) -> features (N, D): `model` without its classifier, tapped where
    need be.

    Parameters
    ----------
    model : nn.Module    the library's model; without its classifiers
    taps : sequence of Tap    modules whose pooled outputs are concatenated; empty = the model's
        output is the feature
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap] = ()) -> None:
        super().__init__()
        self.model = model
        self.taps = tuple(taps)
        self._caught: dict[int, list[list[Tensor]]] = {}  # per thread, as one module serves several
        for index, tap in enumerate(self.taps):
            model.get_submodule(tap.name).register_forward_hook(partial(self._catch, index))

    def forward(self, images: Tensor) -> Tensor:
        if not self.taps:
            output: Tensor = self.model(images)
            return output.flatten(1)
        caught: list[list[Tensor]] = [[] for _ in self.taps]
        self._caught[get_ident()] = caught
        try:
            self.model(images)
        except _Reached:
            pass
        finally:
            del self._caught[get_ident()]
        vectors = [tap.pooling(outputs[-1]) for tap, outputs in zip(self.taps, caught, strict=True)]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, 1)

    def train(self, mode: bool = True) -> Headless:
        """Switch the layers, never the root's own flag: there it only selects training-time
        outputs.
        """
        super().train(mode)
        self.model.training = False
        return self

    def _catch(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        caught = self._caught.get(get_ident())
        if caught is None:
            return
        tensor = first_tensor(output)
        assert tensor is not None
        caught[index].append(tensor)
        if all(len(outputs) == tap.count for outputs, tap in zip(caught, self.taps, strict=True)):
            raise _Reached

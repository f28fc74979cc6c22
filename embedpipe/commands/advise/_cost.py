"""What fine-tuning costs on this machine: a few training steps are run and timed.

>>> pace = measure_pace(backbone, ["blocks.5"])
>>> pace.minutes(n_train=1000, n_val=300, epochs=10)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from embedpipe.backbones import Backbone, cut_before, unfreeze_parameters
from embedpipe.errors import UsageError

BATCH, STEPS = 8, 2


@dataclass(frozen=True)
class Pace:
    """Seconds an image, decoding and the optimiser left out.

    once_s : float       of the layers that stay frozen, where their activations can be kept
    step_s : float       of a training step of what runs in every epoch
    forward_s : float    of its forward pass
    """

    once_s: float
    step_s: float
    forward_s: float

    def minutes(self, *, n_train: int, n_val: int, epochs: int) -> float:
        once = (n_train + n_val) * self.once_s
        return (once + epochs * (n_train * self.step_s + n_val * self.forward_s)) / 60


def measure_pace(backbone: Backbone, unfreeze: Sequence[str]) -> Pace:
    """Time, on random images on the CPU, the frozen layers, and forward and backward passes of those after them.

    A model that cannot be cut runs whole in every epoch.
    """
    names = unfreeze_parameters(backbone, unfreeze)
    images = torch.rand(BATCH, 3, *backbone.image_size).contiguous(memory_format=torch.channels_last)
    try:
        cut = cut_before(backbone, names)
    except UsageError:
        return Pace(0.0, *_measure(backbone, names, backbone.module, images))
    if cut is None:
        return Pace(0.0, 0.0, 0.0)
    with torch.inference_mode():
        once_s = _time(lambda: cut.trunk(images))
    with torch.no_grad():
        activations = cut.trunk(images)
    return Pace(once_s, *_measure(backbone, names, cut.tail, activations))


def _measure(backbone: Backbone, names: Sequence[str], part: torch.nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a training step and of a forward pass of a part of the backbone, on inputs x."""
    with torch.inference_mode():
        forward_s = _time(lambda: part(x))
    for name in names:
        backbone.module.model.get_parameter(name).requires_grad_(True)
    try:
        return _time(lambda: part(x).square().mean().backward()), forward_s
    finally:
        backbone.module.requires_grad_(False).zero_grad(set_to_none=True)


def _time(work: Callable[[], object]) -> float:
    """Return seconds an image, the first call left out."""
    work()
    start = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - start) / (STEPS * BATCH)

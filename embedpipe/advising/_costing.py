"""What fine-tuning costs on this machine: a few training steps are run and timed.

>>> pace = measure_pace(backbone, ["blocks.5"])
>>> minutes(pace, n_train=1000, n_val=300, epochs=10)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from embedpipe.backbones import Backbone, unfreeze_parameters

BATCH, STEPS = 8, 2


@dataclass(frozen=True)
class Pace:
    """Seconds an image of a training step and of a forward pass, decoding and the optimiser left out."""

    step_s: float
    forward_s: float

    def minutes(self, *, n_train: int, n_val: int, epochs: int) -> float:
        return epochs * (n_train * self.step_s + n_val * self.forward_s) / 60


def measure_pace(backbone: Backbone, unfreeze: Sequence[str]) -> Pace:
    """Time forward passes, and forward and backward passes that reach what `unfreeze` names, on random images on the CPU."""
    module, names = backbone.module, set(unfreeze_parameters(backbone, unfreeze))
    images = torch.rand(BATCH, 3, *backbone.image_size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        forward_s = _time(lambda: module(images))
    if not names:
        return Pace(forward_s, forward_s)
    for name, parameter in module.model.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        step_s = _time(lambda: module(images).square().mean().backward())
    finally:
        module.requires_grad_(False).zero_grad(set_to_none=True)
    return Pace(step_s, forward_s)


def _time(work: Callable[[], object]) -> float:
    """Return seconds an image, the first call left out."""
    work()
    start = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - start) / (STEPS * BATCH)

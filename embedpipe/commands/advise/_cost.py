"""Estimate the cost of an option on this machine; fine-tuning is estimated from a few timed training steps.

>>> minutes_of(measure_pace(backbone, ["blocks.5"]), n_train=1000, n_val=300, epochs=10)
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, cut_before, unfreeze_parameters
from embedpipe.classifier import Reference
from embedpipe.commands.advise._decision import Option
from embedpipe.commands.advise._measurement import Evidence
from embedpipe.errors import UsageError
from embedpipe.features import FeatureSet

BATCH, STEPS = 8, 2


def estimate_minutes(option: Option, features: FeatureSet, evidence: Evidence, epochs: int) -> float | None:
    """Return the cost of an option: measured for heads, estimated for fine-tuning, None for manual work."""
    if not option.action.startswith("finetune"):
        return option.cost_minutes
    backbone = features.backbone or Reference.of(features.spaces[-1:]).load()
    pace = measure_pace(backbone, option.layers or ("all",))
    return minutes_of(pace, n_train=evidence.n_train, n_val=evidence.n_val, epochs=epochs)


def minutes_of(pace: tuple[float, float, float], *, n_train: int, n_val: int, epochs: int) -> float:
    """Return the minutes of a training at the pace that `measure_pace` returns."""
    once_s, step_s, forward_s = pace
    return ((n_train + n_val) * once_s + epochs * (n_train * step_s + n_val * forward_s)) / 60


def measure_pace(backbone: Backbone, unfreeze: Sequence[str]) -> tuple[float, float, float]:
    """Time the frozen layers, and forward and backward passes of the others, on random images on the CPU.

    A model that cannot be cut runs completely in every epoch.

    Returns
    -------
    seconds per image, without decoding and the optimizer:
    once_s : float       of the frozen layers, where their activations can be cached; they run once
    step_s : float       of a training step of the layers that run in every epoch
    forward_s : float    of their forward pass
    """
    names = unfreeze_parameters(backbone, unfreeze)
    images = torch.rand(BATCH, 3, *backbone.image_size).contiguous(memory_format=torch.channels_last)
    try:
        cut = cut_before(backbone, names)
    except UsageError:
        return 0.0, *_time_training(backbone, names, backbone.module, images)
    if cut is None:
        return 0.0, 0.0, 0.0
    with torch.no_grad():
        once_s, activations = _time(lambda: cut.trunk(images)), cut.trunk(images)
    return once_s, *_time_training(backbone, names, cut.tail, activations)


def _time_training(backbone: Backbone, names: Sequence[str], part: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the seconds per image of a training step and of a forward pass of a part of the backbone, on inputs x."""
    with torch.inference_mode():
        forward_s = _time(lambda: part(x))
    for name in names:
        backbone.module.model.get_parameter(name).requires_grad_(True)
    try:
        return _time(lambda: part(x).square().mean().backward()), forward_s
    finally:
        backbone.module.requires_grad_(False).zero_grad(set_to_none=True)


def _time(work: Callable[[], object]) -> float:
    """Return seconds per image; a first call is not timed."""
    work()
    return timeit.timeit(work, number=STEPS) / (STEPS * BATCH)

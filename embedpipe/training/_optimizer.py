"""The optimiser, and what its parameter groups depend on: the layer of a parameter, and whether it decays."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch

# torchvision's models do not name the parameters that should not decay; timm's do.
NO_DECAY = ("*class_token", "*pos_embed*", "*relative_position_bias_table", "*logit_scale")


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return an optimiser over groups with their own `lr` and `weight_decay`."""
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


def layer_numbers(model: Any, stages: Sequence[str]) -> dict[str, int]:
    """Return the layer number of each parameter, 0 for the first layer.

    timm's models number their own layers (`group_matcher`). For any other model, the layers are `stages`, dotted names in
    the order of execution; parameters before the first stage are in layer 0.
    """
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        return dict(group_parameters(model, model.group_matcher(coarse=False), reverse=True))
    number, numbers = 0, {}
    for name, _ in model.named_parameters():
        number = next((n for n, stage in enumerate(stages) if name.startswith(f"{stage}.")), number)
        numbers[name] = number
    return numbers


def keeps_size(model: Any, name: str, ndim: int) -> bool:
    """Return True if a parameter is exempt from weight decay: biases, norms, and tables such as position embeddings."""
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return ndim <= 1 or any(fnmatch(name, pattern) for pattern in (*NO_DECAY, *own))

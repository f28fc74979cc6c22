"""What parameters an optimiser treats apart: by the layer they are in, and whether they are kept small."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

# What torchvision's models do not say of their tables; timm's name their own.
TABLES = ("*class_token", "*pos_embed*", "*relative_position_bias_table", "*logit_scale")


def layer_numbers(model: Any, stages: Sequence[str]) -> dict[str, int]:
    """Return the number of the layer that each parameter is in, the first one 0.

    timm's models number their own layers (`group_matcher`); any other model is counted in `stages`, dotted names in the
    order in which they run, and what stands before the first of them is layer 0.
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
    """Tell whether a parameter is left out of weight decay: biases, norms, and tables such as positions."""
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return ndim <= 1 or any(fnmatch(name, pattern) for pattern in (*TABLES, *own))

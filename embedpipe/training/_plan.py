"""Plan: how a network is trained. Its fields are options of `finetune`, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from embedpipe.errors import UsageError

AT_LEAST = {"epochs": 1, "batch_size": 1, "accumulate": 1, "patience": 1}
BELOW_ONE = ("label_smoothing", "ema")


@dataclass(frozen=True)
class Plan:
    """How a network is trained; what is 0 or None is not done.

    optimizer : str          adamw, or sgd with Nesterov momentum 0.9
    clip_norm : float        the norm of all gradients is cut to it
    label_smoothing : float  share of each label that is spread over all classes
    ema : float              decay of the running average of the weights, a step
    l2_sp : float            penalty l2_sp / 2 * ||w - start||^2 on the groups with `anchored`
    patience : int           epochs without a better validation before training ends
    precision : str          of forward and backward: fp32, bf16 or fp16 (cuda only); weights and validation are fp32
    accumulate : int         batches an optimiser step
    mixup, cutmix : float    alpha of the Beta distribution that mixes pairs of images; both: one at random a batch
    """

    epochs: int = 10
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    l2_sp: float = 0.0
    patience: int | None = None
    precision: str = "fp32"
    accumulate: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Take what is of training out of the options of a deed.

        Raises
        ------
        UsageError    a number out of its range
        """
        check_ranges(options)
        return cls(**{field.name: options[field.name] for field in fields(cls)})


def check_ranges(options: Mapping[str, Any]) -> None:
    """Refuse counts below 1, shares outside [0, 1) and negative numbers, by the option's name."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name == "seed":
            continue
        least = AT_LEAST.get(name, 0)
        if not value >= least:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
        if name in BELOW_ONE and not value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, expected less than 1")
        if name == "layer_decay" and not 0 < value <= 1:
            raise UsageError(f"--layer-decay is {value}, expected more than 0, at most 1")

"""Plan: how a network is trained; Score, Epoch and Trained: what training reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from embedpipe.errors import UsageError

AT_LEAST = {"epochs": 1, "batch_size": 1, "accumulate": 1, "patience": 1}
BELOW_ONE = ("label_smoothing", "ema")


@dataclass(frozen=True)
class Plan:
    """Hyperparameters of training, the options of `finetune` under the same names; 0 or None switches one off.

    optimizer : str          adamw, or sgd with Nesterov momentum 0.9
    clip_norm : float        largest norm of all gradients
    label_smoothing : float  share of each label that is spread over all classes
    ema : float              decay per step of the exponential moving average of the weights
    l2_sp : float            penalty l2_sp / 2 * ||w - start||^2 on the groups with `anchored`
    patience : int           epochs without a better validation score before training stops
    precision : str          of forward and backward pass: fp32, bf16 or fp16 (cuda only); weights and validation are fp32
    accumulate : int         batches per optimiser step
    mixup, cutmix : float    alpha of the Beta distribution; with both, one of them is drawn for each batch
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
        """Return the plan in the options of a command, which may have further ones.

        Raises
        ------
        UsageError    a number is out of its range
        """
        check_ranges(options)
        return cls(**{field.name: options[field.name] for field in fields(cls)})


def check_ranges(options: Mapping[str, Any]) -> None:
    """Raise UsageError for counts below 1, shares outside [0, 1) and negative numbers."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name == "seed":
            continue
        least = AT_LEAST.get(name, 0)
        expected = ""
        if not value >= least:
            expected = f"{least} or more"
        elif name in BELOW_ONE and not value < 1:
            expected = "less than 1"
        elif name == "layer_decay" and not 0 < value <= 1:
            expected = "more than 0, at most 1"
        if expected:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


@dataclass(frozen=True)
class Score:
    """Validation score of one state: mean cross-entropy, and accuracy in [0, 1]."""

    loss: float
    accuracy: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: accuracy first, the loss breaks ties."""
        return self.accuracy, -self.loss


@dataclass(frozen=True)
class Epoch:
    """Losses and scores of an epoch; epoch 0 is the initial state and has no training loss. `ema_*`: of the averaged weights."""

    epoch: int
    train_loss: float | None
    val_loss: float
    val_accuracy: float
    seconds: float
    ema_val_loss: float | None = None
    ema_val_accuracy: float | None = None


@dataclass(frozen=True)
class Trained:
    """The result of training; the network holds the best state.

    best_epoch : int
    best_of : str     "weights", or "ema" for their average
    diverged : str    which value was not finite, and in which epoch; "" where all were finite
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    best_of: str
    diverged: str

"""What training tells: the score of a state, an epoch, and what came out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Validation of one state: mean cross-entropy, and accuracy in [0, 1]."""

    loss: float
    accuracy: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: accuracy first, the loss breaks ties."""
        return self.accuracy, -self.loss


@dataclass(frozen=True)
class Epoch:
    """epoch 0 is the state before the first step; it has no training loss. `ema_*`: the average of the weights."""

    epoch: int
    train_loss: float | None
    val_loss: float
    val_accuracy: float
    seconds: float
    ema_val_loss: float | None = None
    ema_val_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trained:
    """What came out; the network holds the best state.

    best_epoch : int
    best_of : str     "weights", or "ema", their average
    diverged : str    what was not finite, and when; "" where all was
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    best_of: str
    diverged: str

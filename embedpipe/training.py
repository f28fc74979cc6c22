"""The one torch loop: optimiser step, schedule, best epoch by validation.

It knows tensors and modules, nothing of images, caches or heads. What must not move is handed in as modules to keep in
eval mode; what is not trainable has `requires_grad=False` already.

>>> train(network, groups, batches, validate, epochs=10, steps=35, keep_eval=frozen)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedpipe.errors import EmbedpipeError

WARM_UP = 0.1  # share of all steps with a rising learning rate
CLIP_NORM = 1.0


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
    """epoch 0 is the state before the first step; it has no training loss."""

    epoch: int
    train_loss: float | None
    val_loss: float
    val_accuracy: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    network: nn.Module,
    groups: list[dict[str, Any]],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    validate: Callable[[], Score],
    *,
    epochs: int,
    steps: int,
    keep_eval: Sequence[nn.Module],
    class_weight: Tensor | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Epoch]:
    """Train with AdamW, warm-up and cosine decay; leave the network in the best epoch's state, in eval mode.

    Epoch 0, the state handed in, competes too: training never ends below where it began on validation.

    Parameters
    ----------
    groups : list of dict
        Parameter groups for AdamW, each with its `lr` and `weight_decay`.
    batches : epoch -> iterable of (images float32 (n, 3, H, W), y int64 (n,))
    validate : () -> Score
        Called with the network in eval mode.
    steps : int
        Batches an epoch.
    keep_eval : list of Module
        Modules that stay in eval mode: frozen layers.

    Raises
    ------
    EmbedpipeError    the loss is not finite; the network is left in its best state

    Source: Loshchilov and Hutter, ICLR 2019 (AdamW) and ICLR 2017 (cosine schedule).
    """
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_cosine(epochs * steps))
    history, best, best_rank = [], _moving(network, keep_eval), (-math.inf, 0.0)
    try:
        for epoch in range(epochs + 1):
            start, losses = time.monotonic(), []
            set_modes(network, keep_eval)
            for images, y in batches(epoch) if epoch else ():
                loss = F.cross_entropy(network(images), y, weight=class_weight)
                if not torch.isfinite(loss):
                    raise EmbedpipeError(
                        f"the training loss became {loss.item()} in epoch {epoch}", hint="try a smaller --lr"
                    )
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(_trainable(network), CLIP_NORM)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                on_step()
            network.eval()
            score = validate()
            if score.rank > best_rank:
                best, best_rank = _moving(network, keep_eval), score.rank
            mean = sum(losses) / len(losses) if losses else None
            seconds = round(time.monotonic() - start, 3)
            history.append(Epoch(epoch, mean, score.loss, score.accuracy, seconds))
    finally:
        network.load_state_dict(best, strict=False)
        network.eval()
    return history


def set_modes(network: nn.Module, keep_eval: Sequence[nn.Module]) -> None:
    """Put the network into train mode, and what is frozen into eval mode."""
    network.train()
    for module in keep_eval:
        module.eval()


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def moving_names(network: nn.Module, keep_eval: Sequence[nn.Module]) -> set[str]:
    """Return the names in the state dict that training may change: trainable parameters, and buffers in train mode."""
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    still = {id(module) for frozen in keep_eval for module in frozen.modules()}
    for prefix, module in network.named_modules():
        if id(module) not in still:
            names |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    return names & set(network.state_dict())


def _moving(network: nn.Module, keep_eval: Sequence[nn.Module]) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: state[name].clone() for name in moving_names(network, keep_eval)}


def _warm_up_cosine(total: int) -> Callable[[int], float]:
    warm = max(1, round(WARM_UP * total))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    return factor

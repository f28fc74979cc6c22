"""train: epochs and checkpoints until the last epoch, the patience, or a loss that is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from embedpipe.errors import Stopped
from embedpipe.training._plan import Epoch, Plan, Score, Trained
from embedpipe.training._ranks import Ranks
from embedpipe.training._state import Average, delay_signals, load_tensors, moving_state, random_state, set_random_state
from embedpipe.training._steps import Batch, NotFinite, Stepper, make_optimizer

WARM_UP = 0.1  # share of all steps with a rising learning rate
ONE_PROCESS = Ranks()


def train(
    network: nn.Module,
    groups: list[dict[str, Any]],
    batches: Callable[[int], Iterable[Batch]],
    validate: Callable[[], Score],
    *,
    plan: Plan,
    steps: int,
    keep_eval: Sequence[nn.Module],
    n_classes: int = 0,
    class_weight: Tensor | None = None,
    ranks: Ranks = ONE_PROCESS,
    resume: Mapping[str, Any] | None = None,
    checkpoint: Callable[[dict[str, Any]], None] = lambda _: None,
    checkpoint_s: float = 120.0,
    on_step: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Train with warm-up and cosine decay; leave the network in the best state by validation, in eval mode.

    Epoch 0, the initial state, competes too: training never ends with a worse validation score than it began with. A loss
    or gradient that is not finite ends training before it changes a weight.

    Parameters
    ----------
    groups : list of dict
        Parameter groups of the optimiser, each with its `lr` and `weight_decay`; `l2_sp` applies to `anchored` ones.
    batches : epoch -> iterable of (images float32 (n, 3, H, W), y int64 (n,))
        Must return the same batches for the same epoch, and draw no random numbers from torch's own generators.
    validate : () -> Score
        Called with the network in eval mode.
    steps : int
        Batches per epoch.
    keep_eval : list of Module
        Modules that stay in eval mode: frozen layers.
    n_classes : int
        For mixed labels.
    ranks : Ranks
        Processes that train together: `batches` returns the part of this process, `validate` the same score in each.
    resume : dict
        The last argument of `checkpoint`: training continues from there, on a CPU to the same bits as without a break.
    checkpoint : state -> None
        Called after each epoch, every `checkpoint_s` seconds, and between two steps when SIGTERM or SIGINT ends the work.
    on_step : number of optimiser steps done -> None

    Source: Loshchilov and Hutter, ICLR 2019 (AdamW) and ICLR 2017 (cosine schedule).
    """
    optimizer = make_optimizer(plan.optimizer, groups)
    stepper = Stepper(network, optimizer, plan, n_classes=n_classes, class_weight=class_weight, ranks=ranks)
    trainer = Trainer(stepper, steps=max(1, steps // plan.accumulate), keep_eval=keep_eval)
    if resume:
        trainer.load(resume)

    def save() -> None:
        with delay_signals():
            checkpoint(trainer.state())

    try:
        while not trainer.ended:
            saved = time.monotonic()
            for done in trainer.steps_of(batches):
                on_step(done)
                if time.monotonic() - saved > checkpoint_s:
                    save()
                    saved = time.monotonic()
            if not trainer.diverged:
                trainer.validate(validate)
                save()
    except (Stopped, KeyboardInterrupt):
        save()
        raise
    finally:
        load_tensors(network, trainer.best)
        network.eval()
    return Trained(tuple(trainer.history), trainer.best_epoch, trainer.best_of, trainer.diverged)


class Trainer:
    """The state of a training, which can be saved after any step and restored.

    epoch : int      the current one; 0 is the initial state, which is only validated
    losses : list    of the steps done in this epoch
    best : dict      tensors of the best state
    """

    def __init__(self, stepper: Stepper, *, steps: int, keep_eval: Sequence[nn.Module]) -> None:
        self.network, self.plan, self.optimizer = stepper.network, stepper.plan, stepper.optimizer
        self.stepper, self.steps, self.keep_eval = stepper, steps, keep_eval
        self.schedule = LambdaLR(self.optimizer, lambda step: _warm_up_cosine(step, self.plan.epochs * steps))
        ema = self.plan.ema
        self.average = Average(moving_state(self.network, keep_eval), ema) if ema else None
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_rank, self.best_epoch, self.best_of = (-math.inf, 0.0), 0, "weights"
        self.epoch, self.losses, self.diverged = 0, list[float](), ""
        self.begun = time.monotonic()

    @property
    def ended(self) -> bool:
        patience = self.plan.patience or math.inf
        done = self.epoch - 1
        return bool(self.diverged) or done >= self.plan.epochs or done - self.best_epoch >= patience

    def steps_of(self, batches: Callable[[int], Iterable[Batch]]) -> Iterator[int]:
        """Take the remaining steps of this epoch, and yield the number of all steps done."""
        if self.epoch == 0 or len(self.losses) >= self.steps:
            return
        self.network.train()
        for module in self.keep_eval:
            module.eval()
        stream = iter(batches(self.epoch))
        groups = iter(lambda: list(islice(stream, self.plan.accumulate)), [])
        remaining = islice(groups, len(self.losses), self.steps)
        # until no rank has a group: unreadable images may make the part of one rank shorter
        while not self.diverged and self.stepper.ranks.any(bool(group := next(remaining, []))):
            with delay_signals():
                self._step(group)
            if not self.diverged:
                yield (self.epoch - 1) * self.steps + len(self.losses)

    def _step(self, group: Sequence[Batch]) -> None:
        try:
            loss = self.stepper.step(group)
        except NotFinite as exc:
            self.diverged = f"{exc} in epoch {self.epoch}"
            return
        self.schedule.step()
        if self.average:
            self.average.update(self.network)
        self.losses.append(loss)

    def validate(self, validate: Callable[[], Score]) -> None:
        """Validate, and end the epoch."""
        self.network.eval()
        score, averaged = validate(), None
        if self.average and self.epoch:
            with self.average.inside(self.network):
                averaged = validate()
        with delay_signals():
            self._record(score, averaged)

    def _record(self, score: Score, averaged: Score | None) -> None:
        if score.rank > self.best_rank:
            self.best, self.best_rank = moving_state(self.network, self.keep_eval), score.rank
            self.best_epoch, self.best_of = self.epoch, "weights"
        if self.average and averaged and averaged.rank > self.best_rank:
            self.best = {name: tensor.clone() for name, tensor in self.average.tensors.items()}
            self.best_rank, self.best_epoch, self.best_of = averaged.rank, self.epoch, "ema"
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        seconds = round(time.monotonic() - self.begun, 3)
        ema = (averaged.loss, averaged.accuracy) if averaged else (None, None)
        self.history.append(Epoch(self.epoch, mean, score.loss, score.accuracy, seconds, *ema))
        self.epoch, self.losses, self.begun = self.epoch + 1, [], time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on, as tensors and plain values."""
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "seconds": time.monotonic() - self.begun,
            "history": [asdict(epoch) for epoch in self.history],
            "moving": moving_state(self.network, self.keep_eval),
            "best": self.best,
            "found": (self.best_rank, self.best_epoch, self.best_of),
            "average": (self.average.tensors, self.average.updates) if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "micro": self.stepper.micro,
            "random": random_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        load_tensors(self.network, state["moving"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.stepper.micro = state["micro"]
        if self.average:
            tensors, self.average.updates = state["average"]
            for name, tensor in self.average.tensors.items():
                tensor.copy_(tensors[name])
        self.best, self.losses, self.epoch = state["best"], list(state["losses"]), state["epoch"]
        self.best_rank, self.best_epoch, self.best_of = state["found"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.begun = time.monotonic() - state["seconds"]
        set_random_state(state["random"])


def _warm_up_cosine(step: int, total: int) -> float:
    """Return the factor of the learning rate at one of `total` steps."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

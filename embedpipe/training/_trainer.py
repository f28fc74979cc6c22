"""Trainer: where training is. Everything that shapes the rest of it can be taken out and put back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from embedpipe.training._epochs import Epoch, Score, Trained
from embedpipe.training._mixing import Batch
from embedpipe.training._plan import Plan
from embedpipe.training._signals import signals_held
from embedpipe.training._state import Average, moving_state, put, random_state, set_modes, set_random_state
from embedpipe.training._steps import NotFinite, Stepper, make_optimizer

WARM_UP = 0.1  # share of all steps with a rising learning rate


class Trainer:
    """One training under way.

    stepping         arguments of `Stepper`
    epoch : int      under way; 0 is the state handed in, which is only judged
    losses : list    of the steps done in this epoch
    best : dict      tensors of the best state
    """

    def __init__(
        self,
        network: nn.Module,
        groups: list[dict[str, Any]],
        plan: Plan,
        *,
        steps: int,
        keep_eval: Sequence[nn.Module],
        **stepping: Any,
    ) -> None:
        self.network, self.plan, self.steps, self.keep_eval = network, plan, steps, keep_eval
        self.optimizer = make_optimizer(plan.optimizer, groups)
        self.schedule = LambdaLR(self.optimizer, _warm_up_cosine(plan.epochs * steps))
        self.stepper = Stepper(network, self.optimizer, plan, **stepping)
        self.average = Average(moving_state(network, keep_eval), plan.ema) if plan.ema else None
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
        """Take the steps of this epoch that are left, and yield the number of all steps done."""
        if self.epoch == 0 or len(self.losses) >= self.steps:
            return
        set_modes(self.network, self.keep_eval)
        grouped = _grouped(batches(self.epoch), self.plan.accumulate)
        for group in self._in_step(islice(grouped, len(self.losses), self.steps)):
            with signals_held():
                self._step(group)
            if self.diverged:
                return
            yield (self.epoch - 1) * self.steps + len(self.losses)

    def _in_step(self, groups: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield groups as long as any rank has one: unreadable images make the part of one rank shorter."""
        while self.stepper.ranks.any(bool(group := next(groups, []))):
            yield group

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

    def judge(self, validate: Callable[[], Score]) -> None:
        """Validate, and end the epoch."""
        self.network.eval()
        score, averaged = validate(), None
        if self.average and self.epoch:
            with self.average.inside(self.network):
                averaged = validate()
        with signals_held():
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

    def leave_best(self) -> None:
        """Put the best state into the network, in eval mode."""
        put(self.network, self.best)
        self.network.eval()

    def trained(self) -> Trained:
        return Trained(tuple(self.history), self.best_epoch, self.best_of, self.diverged)

    def state(self) -> dict[str, Any]:
        """Return all that shapes the rest, as tensors and plain values."""
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "seconds": time.monotonic() - self.begun,
            "history": [epoch.to_dict() for epoch in self.history],
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
        """Go on from what `state` returned."""
        put(self.network, state["moving"])
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


def _grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    stream = iter(batches)
    return iter(lambda: list(islice(stream, size)), [])


def _warm_up_cosine(total: int) -> Callable[[int], float]:
    warm = max(1, round(WARM_UP * total))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    return factor

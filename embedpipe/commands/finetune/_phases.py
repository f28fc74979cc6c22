"""Phases: one training after the other, each with what it unfreezes and its own rates, from the best state before it.

Without a schedule there is one, of the options themselves.

>>> trained, unfrozen = Course(network, backbone, photos, unfinished, validate, None, None).run()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from embedpipe.backbones import Backbone
from embedpipe.classifier import Network, parameter_groups, release
from embedpipe.commands.finetune._activations import Activations
from embedpipe.commands.finetune._checks import frozen_proved
from embedpipe.commands.finetune._photos import Photos
from embedpipe.commands.finetune._unfinished import Unfinished
from embedpipe.errors import UsageError
from embedpipe.inference import Progress
from embedpipe.provenance import nearest
from embedpipe.training import Epoch, Plan, Score, Trained, moving_state, put, train

RATES = ("lr", "head_lr", "layer_decay", "weight_decay", "l2_sp")
PHASED = ("unfreeze", "epochs", *RATES, "optimizer", "clip_norm", "ema", "patience", "bn", "label_smoothing")


def phases_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of each phase.

    Raises
    ------
    UsageError    a schedule without a phase, a phase with an unknown key or nothing to unfreeze
    """
    schedule = options["schedule"]
    if schedule is not None and not (isinstance(schedule, list) and all(isinstance(p, Mapping) for p in schedule)):
        raise UsageError("--schedule: expected a list of phases, each with keys and values")
    phases = [dict(phase) for phase in schedule or [{}]]
    for number, phase in enumerate(phases, 1):
        for key in phase:
            if key not in PHASED:
                close = nearest(str(key), PHASED)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(PHASED)}"
                raise UsageError(f"--schedule: unknown key {key!r} in phase {number}", hint=hint)
        if isinstance(phase.get("unfreeze"), str):
            phase["unfreeze"] = [phase["unfreeze"]]
    whole = [{**options, **phase} for phase in phases]
    if not all(phase["unfreeze"] for phase in whole):
        raise UsageError("found no layer to unfreeze", hint="try --unfreeze layer4, 1, all or none")
    return whole


@dataclass(frozen=True)
class Past:
    """What the phases before this one came to, and the tensors that they have moved."""

    phase: int = 0
    history: tuple[Epoch, ...] = ()
    best: tuple[int, str] = (0, "weights")
    unfrozen: tuple[str, ...] = ()
    moved: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        return self.history[-1].epoch if self.history else 0

    def followed_by(self, trained: Trained, unfrozen: Sequence[str], moved: Mapping[str, torch.Tensor]) -> Past:
        """Number the epochs of one more phase on; its epoch 0 is the best one before."""
        done = self.epochs
        new = tuple(replace(one, epoch=done + one.epoch) for one in trained.history if one.epoch or not self.history)
        best = (done + trained.best_epoch, trained.best_of) if trained.best_epoch or not self.history else self.best
        names = tuple(dict.fromkeys((*self.unfrozen, *unfrozen)))
        return Past(self.phase + 1, self.history + new, best, names, {**self.moved, **moved})

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "history": [epoch.to_dict() for epoch in self.history]}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Past:
        return cls(**{**written, "history": tuple(Epoch(**epoch) for epoch in written["history"])})


@dataclass(frozen=True)
class Course:
    """All phases of one run.

    validate : () -> Score    of the network as it stands
    """

    network: Network
    backbone: Backbone
    photos: Photos | Activations
    unfinished: Unfinished
    validate: Callable[[], Score]
    class_weight: torch.Tensor | None
    progress: Progress | None

    def run(self) -> tuple[Trained, tuple[str, ...]]:
        """Train the phases that are left; return what came out of all, and the names of what was unfrozen."""
        phases, state = phases_of(self.unfinished.options), self.unfinished.state
        past = Past.from_dict(state["past"]) if state else Past()
        put(self.network, past.moved)
        diverged = ""
        while past.phase < len(phases) and not diverged:
            resume = state["training"] if state and state["past"]["phase"] == past.phase else None
            past, diverged = self._train(phases, past, resume)
        return Trained(past.history, *past.best, diverged), past.unfrozen

    def _train(
        self, phases: Sequence[Mapping[str, Any]], past: Past, resume: Mapping[str, Any] | None
    ) -> tuple[Past, str]:
        """Train one phase; return what all so far came to, and what was not finite."""
        phase = phases[past.phase]
        steps = [max(1, self.photos.steps // one["accumulate"]) * one["epochs"] for one in phases]

        def on_step(done: int) -> None:
            if self.progress and self.photos.ranks.first:
                self.progress("finetune", sum(steps[: past.phase]) + done, sum(steps))

        unfrozen, keep_eval = release(self.network, self.backbone, phase["unfreeze"], bn=phase["bn"])
        with frozen_proved(self.network, keep_eval):
            trained = train(
                self.network,
                parameter_groups(self.network, self.backbone, **{name: phase[name] for name in RATES}),
                lambda epoch: self.photos.shuffled(past.epochs + epoch, seed=phase["seed"], augment=phase["augment"]),
                self.validate,
                plan=Plan.of(phase),
                steps=self.photos.steps,
                keep_eval=keep_eval,
                n_classes=len(self.photos.features.classes),
                class_weight=self.class_weight,
                ranks=self.photos.ranks,
                resume=resume,
                checkpoint=lambda state: self.unfinished.write({"past": past.to_dict(), "training": state}),
                on_step=on_step,
            )
        where = f" of phase {past.phase + 1}" if past.phase and trained.diverged else ""
        return past.followed_by(trained, unfrozen, moving_state(self.network, keep_eval)), trained.diverged + where

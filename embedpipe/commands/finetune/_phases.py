"""Phases: trainings one after the other, each with its own layers and rates, from the best state of the one before.

Without a schedule there is one phase, with the options of the run.

>>> trained, unfrozen = PhasedTraining(network, backbone, source, unfinished, None).run()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from embedpipe.backbones import Backbone
from embedpipe.classifier.network import Network, parameter_groups, release
from embedpipe.commands.finetune._checkpoint import UnfinishedRun
from embedpipe.commands.finetune._sources import TrainingSource, score_split
from embedpipe.errors import EmbedpipeError, UsageError
from embedpipe.evaluation import score
from embedpipe.heads import class_weights
from embedpipe.inference import Progress
from embedpipe.provenance import digest_arrays, nearest
from embedpipe.training import Epoch, Plan, Score, Trained, load_tensors, moving_names, moving_state, train

RATES = ("lr", "head_lr", "layer_decay", "weight_decay", "l2_sp")
PHASE_OPTIONS = ("unfreeze", "epochs", *RATES, "optimizer", "clip_norm", "ema", "patience", "bn", "label_smoothing")


def phases_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of each phase.

    Raises
    ------
    UsageError    a schedule without a phase, a phase with an unknown key or nothing to unfreeze
    """
    schedule = options["schedule"]
    if schedule is not None and not (isinstance(schedule, list) and all(isinstance(p, Mapping) for p in schedule)):
        raise UsageError("--schedule: expected a list of phases, each with keys and values")
    phases = []
    for number, phase in enumerate(schedule or [{}], 1):
        for key in phase:
            if key not in PHASE_OPTIONS:
                close = nearest(str(key), PHASE_OPTIONS)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(PHASE_OPTIONS)}"
                raise UsageError(f"--schedule: unknown key {key!r} in phase {number}", hint=hint)
        phases.append({**options, **phase})
        if isinstance(phases[-1]["unfreeze"], str):
            phases[-1]["unfreeze"] = [phases[-1]["unfreeze"]]
    if not all(phase["unfreeze"] for phase in phases):
        raise UsageError("found no layer to unfreeze", hint="try --unfreeze layer4, 1, all or none")
    return phases


@dataclass(frozen=True)
class CompletedPhases:
    """The result of the phases so far.

    phase : int        number of completed phases
    best : (int, str)  epoch of the best state, and whether it is of the "weights" or their average, "ema"
    moved : dict       the tensors that training has changed, by name
    """

    phase: int = 0
    history: tuple[Epoch, ...] = ()
    best: tuple[int, str] = (0, "weights")
    unfrozen: tuple[str, ...] = ()
    moved: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        return self.history[-1].epoch if self.history else 0

    def add(self, trained: Trained, unfrozen: Sequence[str], moved: Mapping[str, torch.Tensor]) -> CompletedPhases:
        """Append a phase. Its epochs are numbered consecutively; its epoch 0 is the best one of the phases before."""
        done = self.epochs
        new = tuple(replace(one, epoch=done + one.epoch) for one in trained.history if one.epoch or not self.history)
        best = (done + trained.best_epoch, trained.best_of) if trained.best_epoch or not self.history else self.best
        names = tuple(dict.fromkeys((*self.unfrozen, *unfrozen)))
        return CompletedPhases(self.phase + 1, self.history + new, best, names, {**self.moved, **moved})

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "history": [asdict(epoch) for epoch in self.history]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CompletedPhases:
        return cls(**{**stored, "history": tuple(Epoch(**epoch) for epoch in stored["history"])})


@dataclass(frozen=True)
class PhasedTraining:
    """The training of one run."""

    network: Network
    backbone: Backbone
    source: TrainingSource
    unfinished: UnfinishedRun
    progress: Progress | None

    def validate(self) -> Score:
        """Return the score of the network in its current state on val, on every rank that of the first."""
        return self.source.ranks.broadcast(self._score_val)

    def _score_val(self) -> Score:
        scored = score_split(self.network, self.source, "val")
        values = score(scored.probabilities, scored.labels(self.source.features.classes))
        return Score(values["log_loss"], values["accuracy"])

    def _class_weight(self) -> torch.Tensor | None:
        """Return the weight float32 (C,) of each class in the loss, None for equal ones."""
        if self.unfinished.options["class_weight"] == "none":
            return None
        y = self.source.features.manifest.targets(self.source.samples("train"))
        weight = class_weights(y, len(self.source.features.classes))
        return torch.as_tensor(weight, dtype=torch.float32, device=self.source.forward.device)

    def run(self) -> tuple[Trained, tuple[str, ...]]:
        """Train the remaining phases; return the result of all phases and the names of all unfrozen parameters."""
        phases, state = phases_of(self.unfinished.options), self.unfinished.state
        completed = CompletedPhases.from_dict(state["past"]) if state else CompletedPhases()
        load_tensors(self.network, completed.moved)
        resume, diverged = state["training"] if state else None, ""
        while completed.phase < len(phases) and not diverged:
            completed, diverged = self._train(phases, completed, resume)
            resume = None
        return Trained(completed.history, *completed.best, diverged), completed.unfrozen

    def _train(
        self, phases: Sequence[Mapping[str, Any]], completed: CompletedPhases, resume: Mapping[str, Any] | None
    ) -> tuple[CompletedPhases, str]:
        """Train one phase; return all completed phases, and what became NaN or infinite, "" for nothing."""
        number, source = completed.phase, self.source
        phase = phases[number]
        steps = [max(1, source.steps // one["accumulate"]) * one["epochs"] for one in phases]

        def on_step(done: int) -> None:
            if self.progress and source.ranks.first:
                self.progress("finetune", sum(steps[:number]) + done, sum(steps))

        unfrozen, keep_eval = release(self.network, self.backbone, phase["unfreeze"], bn=phase["bn"])
        with check_frozen(self.network, keep_eval):
            trained = train(
                self.network,
                parameter_groups(self.network, self.backbone, **{name: phase[name] for name in RATES}),
                lambda epoch: source.training_batches(completed.epochs + epoch),
                self.validate,
                plan=Plan.of(phase),
                steps=source.steps,
                keep_eval=keep_eval,
                n_classes=len(source.features.classes),
                class_weight=self._class_weight(),
                ranks=source.ranks,
                resume=resume,
                checkpoint=lambda state: self.unfinished.write({"past": completed.to_dict(), "training": state}),
                on_step=on_step,
            )
        suffix = f" of phase {number + 1}" if number and trained.diverged else ""
        return completed.add(trained, unfrozen, moving_state(self.network, keep_eval)), trained.diverged + suffix


@contextmanager
def check_frozen(network: nn.Module, keep_eval: Sequence[nn.Module]) -> Iterator[None]:
    """Compare the digests of all frozen tensors before and after the block.

    Raises
    ------
    EmbedpipeError    one of them has changed
    """
    frozen = set(network.state_dict()) - moving_names(network, keep_eval)
    before = _digests(network, frozen)
    yield
    changed = [name for name, digest in _digests(network, frozen).items() if digest != before[name]]
    if changed:
        raise EmbedpipeError(
            f"{len(changed)} frozen tensors changed during training, the first is {changed[0]}; expected none",
            hint="this is a defect of embedpipe: please report the model and the command",
            moved=changed,
        )


def _digests(network: nn.Module, names: set[str]) -> dict[str, str]:
    state = network.state_dict()
    return {name: digest_arrays({name: state[name]}) for name in sorted(names)}

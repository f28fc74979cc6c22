"""train: epochs and checkpoints until the end, the patience, or a loss that is not finite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from embedpipe.errors import Stopped
from embedpipe.training._epochs import Score, Trained
from embedpipe.training._mixing import Batch
from embedpipe.training._plan import Plan
from embedpipe.training._ranks import Ranks
from embedpipe.training._signals import signals_held
from embedpipe.training._trainer import Trainer

CHECKPOINT_S = 120.0  # between checkpoints, where epochs are longer
ALONE = Ranks()


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
    ranks: Ranks = ALONE,
    resume: Mapping[str, Any] | None = None,
    checkpoint: Callable[[dict[str, Any]], None] = lambda _: None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Train with warm-up and cosine decay; leave the network in the best state by validation, in eval mode.

    Epoch 0, the state handed in, competes too: training never ends below where it began on validation. A loss or
    gradient that is not finite ends training before it touches a weight.

    Parameters
    ----------
    groups : list of dict
        Parameter groups of the optimiser, each with its `lr` and `weight_decay`; `anchored` ones are held by `l2_sp`.
    batches : epoch -> iterable of (images float32 (n, 3, H, W), y int64 (n,))
        The same for the same epoch; it takes no random numbers from torch's own generators.
    validate : () -> Score
        Called with the network in eval mode.
    steps : int
        Batches an epoch.
    keep_eval : list of Module
        Modules that stay in eval mode: frozen layers.
    n_classes : int
        For labels that are mixed.
    ranks : Ranks
        Processes that train together: `batches` gives each its part, `validate` the same score.
    resume : dict
        What `checkpoint` was last given: training goes on from there, on a CPU to the same bits as without a break.
    checkpoint : state -> None
        Called after each epoch, every two minutes, and between two steps when SIGTERM or SIGINT ends the work.
    on_step : number of optimiser steps done -> None

    Source: Loshchilov and Hutter, ICLR 2019 (AdamW) and ICLR 2017 (cosine schedule).
    """
    each = max(1, steps // plan.accumulate)
    stepping: dict[str, Any] = {"n_classes": n_classes, "class_weight": class_weight, "ranks": ranks}
    trainer = Trainer(network, groups, plan, steps=each, keep_eval=keep_eval, **stepping)
    if resume:
        trainer.load(resume)

    def save() -> None:
        with signals_held():
            checkpoint(trainer.state())

    try:
        while not trainer.ended:
            saved = time.monotonic()
            for done in trainer.steps_of(batches):
                on_step(done)
                if time.monotonic() - saved > CHECKPOINT_S:
                    save()
                    saved = time.monotonic()
            if not trainer.diverged:
                trainer.judge(validate)
                save()
    except (Stopped, KeyboardInterrupt):
        save()
        raise
    finally:
        trainer.leave_best()
    return trainer.trained()

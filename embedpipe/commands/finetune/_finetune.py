"""The deed as it is called: its options, and what shapes the result among them; `_tuning` does the work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, check_removed_option
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.classifier import Classifier
    from embedpipe.inference import Progress

NOT_STORED = ("resume", "device", "workers", "cache_dir", "runs_dir", "progress", "noise")  # change no result


def finetune(
    run: Classifier | PathLike | None = None,
    *,
    unfreeze: tuple[str, ...] | str = (),
    epochs: int = 10,
    lr: float = 1e-3,
    head_lr: float = 1e-3,
    layer_decay: float = 1.0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.01,
    l2_sp: float = 0.0,
    clip_norm: float = 1.0,
    ema: float = 0.0,
    patience: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    grad_checkpointing: bool = False,
    bn: Literal["frozen", "affine", "train"] = "affine",
    init: Literal["head", "random"] = "head",
    augment: Literal["none", "flip", "standard", "strong"] = "none",
    views: int = 0,
    cache_activations: Literal["auto", "on", "off"] = "auto",
    max_cache_size: str = "20GB",
    noise: float | None = None,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Literal["none", "balanced"] = "none",
    wise_ft: bool | Literal["auto"] = False,
    schedule: Sequence[Mapping[str, Any]] | None = None,
    resume: bool | str = False,
    device: str = "auto",
    workers: int | Literal["auto"] = "auto",
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    seed: int = 0,
    progress: Progress | None = None,
) -> Classifier:
    """Train the head and the unfrozen layers on the images of the run's data set; keep the best epoch by validation.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run
        Default: the latest run of fit-head with a linear head on the penultimate layer.
    unfreeze : str or tuple of str
        A layer (it and all executed after it), a glob, a number of last stages, a share such as 20%, all, or none; repeatable.
    epochs : int
        Passes over the train split.
    lr : float
        Learning rate of the unfrozen layers.
    head_lr : float
        Learning rate of the head.
    layer_decay : float
        Each layer before the last one learns that much slower than the one after it.
    optimizer : str
        adamw, or sgd with momentum 0.9.
    weight_decay : float
        Of matrices and kernels only, no norms, biases or tables of positions.
    l2_sp : float
        Pull unfrozen layers to their starting weights, instead of weight decay.
    clip_norm : float
        Largest norm of the gradients; 0: any.
    ema : float
        Judge a running average of the weights, too; its decay a step, such as 0.999.
    patience : int
        End after so many epochs without a better validation.
    batch_size : int
        Images a batch.
    accumulate : int
        Batches a step.
    precision : str
        Of training: fp32, bf16, or fp16 (cuda); weights and validation stay fp32.
    grad_checkpointing : bool
        Less memory, more time: compute activations a second time.
    bn : str
        BatchNorm of unfrozen layers: frozen; affine (scale and shift learn, statistics stay); train (all move).
    init : str
        Start from the fitted head, or from a random one.
    augment : str
        Change training images, as extract does: flip; standard: crops too; strong: RandAugment and erasing too.
    views : int
        Keep so many changed views of each training image, and draw one in each epoch; 0: change images in every epoch.
    cache_activations : str
        Run the frozen layers once an image and view, and train from what they give; auto where that is faster.
    max_cache_size : str
        Most that the activations may take.
    noise : float
        No longer used; activations are trained on without noise.
    mixup : float
        Mix pairs of images; alpha of the Beta distribution, such as 0.2.
    cutmix : float
        Paste a part of one image into another; alpha, such as 1.0.
    label_smoothing : float
        Share of each label that is spread over all classes.
    class_weight : str
        balanced gives every class the same weight in the loss.
    wise_ft : bool or auto
        Score mixtures of the weights before and after on val; auto keeps the best.
    schedule : list of dict
        Phases, one after the other: options (unfreeze, epochs, lr, ...) that differ from those of the run.
    resume : bool or str
        Go on with the latest unfinished run, or the one named.
    device : str
        auto, cpu, cuda, cuda:K or mps.
    workers : int or auto
        Decoding threads.

    Returns
    -------
    Classifier
        With all weights in its run folder.

    Raises
    ------
    UsageError       the head is not a linear one on the penultimate layer, or `unfreeze` matches nothing
    ModelMismatch    backbone and head do not give the logits that the head gave on the cached features
    EmbedpipeError   the loss or a gradient became NaN or infinite; the best state before is saved as a run
    Stopped, Interrupted    by SIGTERM or SIGINT; `resume` goes on
    """
    given = locals()
    check_removed_option("--noise", noise, harmless=(0.0,), reason="activations are trained on without noise")
    from embedpipe.commands.finetune._phases import phases_of
    from embedpipe.commands.finetune._tuning import carry_out, starting_point
    from embedpipe.commands.finetune._unfinished import unfinished_run
    from embedpipe.training import joined

    options = {name: value for name, value in given.items() if name not in NOT_STORED}
    options["unfreeze"] = [unfreeze] if isinstance(unfreeze, str) else list(unfreeze)
    options["schedule"] = list(schedule) if isinstance(schedule, tuple) else schedule
    if resume is False:
        phases_of(options)
    start = starting_point(run, Path(runs_dir)) if run is not None or resume is False else None
    options["run"] = str(start.folder.absolute()) if start and start.folder else None
    again: dict[str, Any] = {"resume": resume, "options": options, "defaults": _defaults()}
    with joined() as ranks, unfinished_run(Path(runs_dir), **again, ranks=ranks) as unfinished:
        forward = {"device": device, "workers": workers}
        tuned = carry_out(unfinished, start, Path(cache_dir), Path(runs_dir), forward, progress)
    return _converged(tuned)


def _converged(tuned: Classifier) -> Classifier:
    """Refuse a run that stopped at numbers that are not finite; it is saved all the same."""
    if tuned.report["stopped"] not in (None, "patience"):
        raise EmbedpipeError(
            f"{tuned.report['stopped']}; {tuned.name} holds epoch {tuned.report['best_epoch']}, the best before",
            hint="try a smaller --lr, or --precision fp32",
            run=tuned.name,
        )
    return tuned


def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(finetune).parameters
    return {name: [] if name == "unfreeze" else one.default for name, one in parameters.items()}

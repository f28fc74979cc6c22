"""The command `finetune`: its options, and which of them are stored with the run; `_training` does the work."""

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
    """Train the head and the unfrozen layers on the images of the run's data set, and keep the epoch that is best on val.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run
        Default: the latest run of fit-head with a linear head on the penultimate layer.
    unfreeze : str or tuple of str
        A layer (and all executed after it), a glob, a number of last stages, a share such as 20%, all or none; repeatable.
    epochs : int
        Passes over the train split.
    lr : float
        Learning rate of the unfrozen layers.
    head_lr : float
        Learning rate of the head.
    layer_decay : float
        Learning rate of each layer relative to the layer after it.
    optimizer : str
        adamw, or sgd with momentum 0.9.
    weight_decay : float
        Applied to matrices and kernels, not to norms, biases or position embeddings.
    l2_sp : float
        Penalty on the distance of unfrozen layers from their starting weights, in place of weight decay.
    clip_norm : float
        Largest norm of the gradients; 0: no limit.
    ema : float
        Also validate a moving average of the weights, with this decay per step, such as 0.999.
    patience : int
        Stop after this many epochs without a better validation score.
    batch_size : int
        Images per batch.
    accumulate : int
        Batches per optimizer step.
    precision : str
        Precision of training: fp32, bf16, or fp16 (cuda); weights and validation are fp32.
    grad_checkpointing : bool
        Recompute activations in the backward pass: less memory, more time.
    bn : str
        BatchNorm of unfrozen layers: frozen; affine (scale and shift are trained, statistics are fixed); train (both change).
    init : str
        Start from the fitted head or from a random one.
    augment : str
        Augmentation of training images, as in extract: flip; standard: also crops; strong: also RandAugment and erasing.
    views : int
        Cache this many augmented views of each training image, and draw one in each epoch; 0: augment anew in each epoch.
    cache_activations : str
        Run the frozen layers once per image and view, and train on their cached output; auto: where that is faster.
    max_cache_size : str
        Largest size of the cached activations.
    noise : float
        No longer used; activations are trained on without noise.
    mixup : float
        Mix pairs of images; alpha of the Beta distribution, such as 0.2.
    cutmix : float
        Paste a part of one image into another; alpha of the Beta distribution, such as 1.0.
    label_smoothing : float
        Share of each label that is distributed over all classes.
    class_weight : str
        balanced: every class has the same total weight in the loss.
    wise_ft : bool or auto
        Score interpolations of the weights before and after training on val; auto: keep the best.
    schedule : list of dict
        Phases, one after the other, each with the options (unfreeze, epochs, lr, ...) that differ from those of the run.
    resume : bool or str
        Resume the latest unfinished run, or the named one.
    device : str
        auto, cpu, cuda, cuda:K or mps.
    workers : int or auto
        Number of decoding processes.

    Returns
    -------
    Classifier
        Saved with all weights in its run folder.

    Raises
    ------
    UsageError       the head is not a linear one on the penultimate layer, or `unfreeze` matches nothing
    ModelMismatch    backbone and head do not give the logits of the head on the cached features
    EmbedpipeError   the loss or a gradient became NaN or infinite; the best state before that is saved as a run
    Stopped, Interrupted    by SIGTERM or SIGINT; `resume` continues
    """
    arguments = locals()
    check_removed_option("--noise", noise, harmless=(0.0,), reason="activations are trained on without noise")
    from embedpipe.commands.finetune._checkpoint import unfinished_run
    from embedpipe.commands.finetune._phases import phases_of
    from embedpipe.commands.finetune._training import load_start, run_training
    from embedpipe.training import join_process_group

    options = {name: value for name, value in arguments.items() if name not in NOT_STORED}
    options["unfreeze"] = [unfreeze] if isinstance(unfreeze, str) else list(unfreeze)
    options["schedule"] = list(schedule) if isinstance(schedule, tuple) else schedule
    if resume is False:
        phases_of(options)  # refuses what it cannot train before anything is loaded
    start = load_start(run, Path(runs_dir)) if run is not None or resume is False else None
    options["run"] = str(start.folder.absolute()) if start and start.folder else None
    begin: dict[str, Any] = {"resume": resume, "options": options, "defaults": _defaults()}
    with join_process_group() as ranks, unfinished_run(Path(runs_dir), **begin, ranks=ranks) as unfinished:
        machine = {"device": device, "workers": workers}
        tuned = run_training(unfinished, start, Path(cache_dir), Path(runs_dir), machine, progress)
    return _check_finite(tuned)


def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(finetune).parameters
    return {name: [] if name == "unfreeze" else parameter.default for name, parameter in parameters.items()}


def _check_finite(tuned: Classifier) -> Classifier:
    """Raise an error if training stopped at NaN or infinity; the run is saved nevertheless."""
    if tuned.report["stopped"] not in (None, "patience"):
        message = (
            f"{tuned.report['stopped']}; {tuned.name} holds epoch {tuned.report['best_epoch']}, the best one before"
        )
        raise EmbedpipeError(message, hint="try a smaller --lr, or --precision fp32", run=tuned.name)
    return tuned

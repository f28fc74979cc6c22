"""The deed: take up a head, prove the hand-off, train, prove what is frozen, save."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.disk import PathLike
from embedpipe.errors import EmbedpipeError, UsageError
from embedpipe.finetuning._phases import phases_of

if TYPE_CHECKING:
    import torch

    from embedpipe.backbones import Backbone
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, Scored
    from embedpipe.features import FeatureSet
    from embedpipe.finetuning._activations import Activations
    from embedpipe.finetuning._keeping import Wish
    from embedpipe.finetuning._photos import Photos
    from embedpipe.finetuning._unfinished import Unfinished
    from embedpipe.heads import LinearHead
    from embedpipe.network import Network
    from embedpipe.pipeline import Progress
    from embedpipe.training import Ranks, Score, Trained

MACHINE = ("resume", "device", "workers", "cache_dir", "runs_dir", "progress")  # what shapes no result


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
    noise: float = 0.0,
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
        Add Gaussian noise to the activations: its share of their standard deviation, such as 0.1.
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
    from embedpipe.finetuning._unfinished import unfinished_run
    from embedpipe.training import joined

    options = {name: value for name, value in given.items() if name not in MACHINE}
    options["unfreeze"] = [unfreeze] if isinstance(unfreeze, str) else list(unfreeze)
    options["schedule"] = list(schedule) if isinstance(schedule, tuple) else schedule
    if resume is False:
        phases_of(options)
    start = _starting_point(run, Path(runs_dir)) if run is not None or resume is False else None
    options["run"] = str(start.folder.absolute()) if start and start.folder else None
    again: dict[str, Any] = {"resume": resume, "options": options, "defaults": _defaults()}
    with joined() as ranks, unfinished_run(Path(runs_dir), **again, ranks=ranks) as unfinished:
        forward = {"device": device, "workers": workers}
        tuned = _carry_out(unfinished, start, Path(cache_dir), Path(runs_dir), forward, progress)
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


def _carry_out(
    unfinished: Unfinished,
    start: Classifier | None,
    cache_dir: Path,
    runs_dir: Path,
    machine: dict[str, Any],
    progress: Progress | None,
) -> Classifier:
    """Do what the options of an unfinished run say, and save it under its name."""
    import torch

    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier
    from embedpipe.finetuning._keeping import choose_source
    from embedpipe.finetuning._photos import Photos
    from embedpipe.finetuning._proofs import prove_handoff
    from embedpipe.forwarding import plan_forward
    from embedpipe.network import Network
    from embedpipe.training import Plan

    begun, options = time.monotonic(), unfinished.options
    plans, ranks = [Plan.of(phase) for phase in phases_of(options)], unfinished.ranks
    check_ranks(options, ranks)
    classifier = start or _stored_start(unfinished, runs_dir)
    features = _features_of(classifier, Cache(cache_dir))
    forward = plan_forward(batch_size=options["batch_size"] // ranks.count, **machine)
    if plans[0].precision == "fp16" and not forward.device.startswith("cuda"):
        raise UsageError(f"--precision fp16 on {forward.device}, expected cuda", hint="use bf16 or fp32")
    torch.manual_seed(options["seed"])
    backbone = replace(classifier.backbone, module=copy.deepcopy(classifier.backbone.module))
    network = Network(backbone.module, _head_of(classifier))
    network.to(forward.device).to(memory_format=torch.channels_last)
    photos = Photos(features, backbone, forward, ranks)
    photos.view(1, seed=options["seed"], augment=options["augment"])
    handoff = prove_handoff(network, _head_of(classifier), photos)
    if options["init"] == "random":
        network.head.reset_parameters()
    wish, before = _wish(options), unfinished.source
    source, kept = choose_source(network, photos, wish, Cache(cache_dir), before, progress=progress)
    unfinished = replace(unfinished, source=kept)
    with network.checkpointing(backbone.name, wanted=options["grad_checkpointing"]):
        trained, unfrozen, wise = _train(network, backbone, source, unfinished, progress)
    report = {
        "from_run": classifier.report.get("run"),
        "handoff_max_abs_diff": handoff,
        "options": dict(options),
        "resumed": unfinished.state is not None,
        "wise_ft": wise,
        **kept,
        **_describe(network, source, unfrozen, trained, sum(plan.epochs for plan in plans)),
    }
    tuned = _save(network, backbone, source, report, runs_dir, unfinished.name, begun) if ranks.first else None
    ranks.tell(lambda: "saved")
    return tuned or Classifier.load(runs_dir / unfinished.name)


def check_ranks(options: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse what many processes cannot do as one would."""
    if options["batch_size"] % ranks.count:
        found = f"--batch-size {options['batch_size']} for {ranks.count} processes"
        raise UsageError(f"{found}, expected a multiple", hint="it counts the images of all processes together")
    if ranks.count > 1 and any(phase["bn"] == "train" for phase in phases_of(options)):
        raise UsageError(
            "--bn train under torchrun: each process would have its own statistics", hint="use affine or frozen"
        )


def _wish(options: Mapping[str, Any]) -> Wish:
    """Return what all phases together ask of the activations."""
    from embedpipe.disk import BYTES, parse_amount
    from embedpipe.finetuning._keeping import Wish

    phases = phases_of(options)
    return Wish(
        cached=options["cache_activations"],
        unfreeze=tuple(pattern for phase in phases for pattern in phase["unfreeze"]),
        epochs=sum(phase["epochs"] for phase in phases),
        views=options["views"],
        augment=options["augment"],
        seed=options["seed"],
        max_bytes=parse_amount(options["max_cache_size"], BYTES, "--max-cache-size", "20GB"),
        noise=options["noise"],
        images_only="--cutmix" if options["cutmix"] else "",
    )


def _starting_point(run: Classifier | PathLike | None, runs_dir: Path) -> Classifier:
    """Return the classifier to start from: a linear head on the penultimate layer."""
    from embedpipe.classifier import Classifier
    from embedpipe.features import PENULTIMATE
    from embedpipe.runs import latest_run

    def is_wanted(record: Mapping[str, Any]) -> bool:
        reference = record["reference"]
        alone = reference["spec"]["layer"] == PENULTIMATE and "beside" not in reference
        return alone and record["report"]["solver"] != "knn"

    classifier = Classifier.of(latest_run(runs_dir, "fit-head", is_wanted) if run is None else run, runs_dir)
    _head_of(classifier)
    if classifier.task != "single":
        raise UsageError(
            f"{classifier.name} has {classifier.task} targets, expected one class an image to fine-tune on",
            hint="fit a head on class folders, or on a manifest with a column label",
        )
    layers = [part.spec["layer"] for part in classifier.reference.parts]
    if layers != [PENULTIMATE]:
        raise UsageError(
            f"{classifier.name} is fitted on the layer {' + '.join(layers)}, expected the penultimate features alone",
            hint=f"run `embedpipe extract` without --layer, then `embedpipe fit-head --layer {PENULTIMATE}`",
        )
    return classifier


def _stored_start(unfinished: Unfinished, runs_dir: Path) -> Classifier:
    """Return the classifier that an unfinished run started from."""
    if unfinished.options["run"] is None:
        raise UsageError(
            f"{unfinished.name} started from a classifier that lies in no run",
            hint="hand it over again: finetune(classifier, resume=True)",
        )
    return _starting_point(unfinished.options["run"], runs_dir)


def _head_of(classifier: Classifier) -> LinearHead:
    from embedpipe.heads import LinearHead

    if not isinstance(classifier.head, LinearHead):
        raise UsageError(
            f"{classifier.name} has a kNN head, expected a linear one to start from",
            hint="run `embedpipe fit-head` without --solver knn",
        )
    return classifier.head


def _features_of(classifier: Classifier, cache: Cache) -> FeatureSet:
    """Return the data set and the space that the head was fitted on."""
    from embedpipe.features import FeatureSet
    from embedpipe.pipeline import space_name

    spec = dict(classifier.reference.spec)
    space = cache.open_space(spec, name=space_name(spec))
    features = FeatureSet(cache.read_dataset(classifier.dataset), space)
    if not {"train", "val"} <= set(features.splits):
        raise UsageError(
            f"{features.dataset} has features of {', '.join(features.splits) or 'no split'} in {space.folder}, "
            "expected train and val",
            hint="name the cache with --cache-dir, or extract again",
        )
    return features


def _train(
    network: Network,
    backbone: Backbone,
    photos: Photos | Activations,
    unfinished: Unfinished,
    progress: Progress | None,
) -> tuple[Trained, tuple[str, ...], dict[str, Any] | None]:
    """Train, and return what came out, what was unfrozen, and the sweep of WiSE-FT."""
    from embedpipe.finetuning._phases import Course
    from embedpipe.finetuning._photos import score_batches
    from embedpipe.finetuning._wise import sweep

    options, classes = unfinished.options, photos.features.classes

    def validate() -> Score:
        return photos.ranks.tell(lambda: _score(score_batches(network, photos.ordered("val")), classes))

    wanted = options["wise_ft"]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()} if wanted else {}
    weight = _class_weight(photos) if options["class_weight"] == "balanced" else None
    trained, unfrozen = Course(network, backbone, photos, unfinished, validate, weight, progress).run()
    wise = sweep(network, before, validate, keep_best=wanted == "auto") if wanted else None
    return trained, unfrozen, wise


def _score(scored: Scored, classes: Sequence[str]) -> Score:
    from embedpipe.metrics import score
    from embedpipe.training import Score

    values = score(scored.probabilities, scored.labels(classes))
    return Score(values["log_loss"], values["accuracy"])


def _class_weight(photos: Photos | Activations) -> torch.Tensor:
    import numpy as np
    import torch

    from embedpipe.heads import class_weights

    classes = photos.features.classes
    y = np.array([classes.index(s.label or "") for s in photos.samples("train")])
    weight = class_weights(y, len(classes))
    return torch.as_tensor(weight, dtype=torch.float32, device=photos.forward.device)


def _describe(
    network: Network, photos: Photos | Activations, unfrozen: Sequence[str], trained: Trained, epochs: int
) -> dict[str, Any]:
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    trainable = sum(sizes[name] for name in unfrozen)
    return {
        "dataset": photos.features.dataset,
        "unfrozen": list(unfrozen),
        "trainable_parameters": trainable,
        "frozen_parameters": sum(sizes.values()) - trainable,
        "epochs": [epoch.to_dict() for epoch in trained.history],
        "best_epoch": trained.best_epoch,
        "best_of": trained.best_of,
        "stopped": trained.diverged or ("patience" if len(trained.history) <= epochs else None),
        "chosen_on": "val",
        "classes": list(photos.features.classes),
    }


def _save(
    network: Network,
    backbone: Backbone,
    photos: Photos | Activations,
    report: dict[str, Any],
    runs_dir: Path,
    name: str,
    begun: float,
) -> Classifier:
    """Write the run with all its weights, and return the classifier that lies there."""
    from embedpipe.backbones import refresh, save_model
    from embedpipe.classifier import Classifier, Reference, save_run
    from embedpipe.finetuning._photos import score_batches
    from embedpipe.pipeline import space_spec
    from embedpipe.runs import new_run

    splits = [split for split in ("val", "test") if photos.samples(split)]
    scored = {split: score_batches(network, photos.ordered(split)) for split in splits}
    network.requires_grad_(False).to("cpu")
    backbone = refresh(backbone, origin=f"fine-tuned from {backbone.origin}")
    head = network.to_head(photos.features.classes)
    reference = Reference(space_spec(backbone, "fp32", "float32"), {"name": "model"})
    tuned = Classifier(head, reference, _backbone=backbone)
    with new_run(runs_dir, "finetune", name=name) as run:
        (run.folder / "model").mkdir()
        save_model(backbone, head.weight, head.bias, head.classes, run.folder / "model")
        seconds = time.monotonic() - begun
        return save_run(run, "finetune", tuned, photos.features, scored, report, seconds=seconds)

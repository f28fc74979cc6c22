"""The deed: take up a head, prove the hand-off, train, prove what is frozen, save."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, UsageError
from embedpipe.provenance import digest_arrays

if TYPE_CHECKING:
    import torch

    from embedpipe.backbones import Backbone
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, Scored
    from embedpipe.features import FeatureSet
    from embedpipe.finetuning._photos import Photos
    from embedpipe.heads import LinearHead
    from embedpipe.network import Network
    from embedpipe.pipeline import Progress
    from embedpipe.training import Epoch, Score

PathLike = str | os.PathLike[str]


def finetune(
    run: Classifier | PathLike | None = None,
    *,
    unfreeze: tuple[str, ...] | str = (),
    epochs: int = 10,
    lr: float = 1e-3,
    head_lr: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 32,
    bn: Literal["frozen", "affine", "train"] = "affine",
    augment: Literal["none", "flip"] = "none",
    class_weight: Literal["none", "balanced"] = "none",
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
        A layer (it and all executed after it), a glob, a number of last stages, all, or none; repeatable.
    epochs : int
        Passes over the train split.
    lr : float
        Learning rate of the unfrozen layers.
    head_lr : float
        Learning rate of the head.
    weight_decay : float
        AdamW's, on matrices and kernels only.
    batch_size : int
        Images a step.
    bn : str
        BatchNorm of unfrozen layers: frozen; affine (scale and shift learn, statistics stay); train (all move).
    augment : str
        flip mirrors every second training image at random.
    class_weight : str
        balanced gives every class the same weight in the loss.
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
    """
    import torch

    from embedpipe.cache import Cache
    from embedpipe.finetuning._handoff import prove_handoff
    from embedpipe.finetuning._photos import Photos
    from embedpipe.forwarding import plan_forward
    from embedpipe.network import Network, release

    start = time.monotonic()
    if not unfreeze:
        raise UsageError("found no layer to unfreeze", hint="try --unfreeze layer4, 1, all or none")
    if epochs < 1 or batch_size < 1 or min(lr, head_lr, weight_decay) < 0:
        raise UsageError("found a number out of range", hint="epochs and batch size: 1 or more; rates: not negative")
    classifier, head = _starting_point(run, Path(runs_dir))
    features = _features_of(classifier, Cache(Path(cache_dir)))
    forward = plan_forward(device=device, batch_size=batch_size, workers=workers)
    torch.manual_seed(seed)
    backbone = replace(classifier.backbone, module=copy.deepcopy(classifier.backbone.module))
    network = Network(backbone.module, head)
    network.to(forward.device).to(memory_format=torch.channels_last)
    photos = Photos(features, backbone, forward)
    handoff = prove_handoff(network, head, photos)
    patterns = (unfreeze,) if isinstance(unfreeze, str) else unfreeze
    unfrozen, keep_eval = release(network, backbone, patterns, bn=bn)
    rates = {"lr": lr, "head_lr": head_lr, "weight_decay": weight_decay}
    flip, balanced = augment == "flip", class_weight == "balanced"
    options: dict[str, Any] = {"rates": rates, "flip": flip, "balanced": balanced}
    history, scored = _train(network, photos, keep_eval, epochs=epochs, seed=seed, progress=progress, **options)
    report = {
        "from_run": classifier.report.get("run"),
        "handoff_max_abs_diff": handoff,
        **_describe(network, photos, unfrozen, history),
    }
    return _save(network, backbone, photos, scored, report, Path(runs_dir), start)


def _starting_point(run: Classifier | PathLike | None, runs_dir: Path) -> tuple[Classifier, LinearHead]:
    """Return the classifier to start from, and its head: a linear one on the penultimate layer."""
    from embedpipe.classifier import Classifier
    from embedpipe.features import PENULTIMATE
    from embedpipe.heads import LinearHead
    from embedpipe.runs import find_run, latest_run

    if isinstance(run, Classifier):
        classifier = run
    elif run is not None:
        classifier = Classifier.load(find_run(runs_dir, run))
    else:
        folder = latest_run(
            runs_dir,
            "fit-head",
            lambda record: (
                record["report"]["solver"] != "knn"
                and record["reference"]["spec"]["layer"] == PENULTIMATE
                and "beside" not in record["reference"]
            ),
        )
        classifier = Classifier.load(folder)
    if not isinstance(classifier.head, LinearHead):
        raise UsageError(
            f"{classifier.name} has a kNN head, expected a linear one to start from",
            hint="run `embedpipe fit-head` without --solver knn",
        )
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
    return classifier, classifier.head


def _features_of(classifier: Classifier, cache: Cache) -> FeatureSet:
    """Return the data set and the space that the head was fitted on.

    Raises
    ------
    UsageError    they are not in this cache
    """
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
    photos: Photos,
    keep_eval: Sequence[torch.nn.Module],
    *,
    epochs: int,
    rates: dict[str, float],
    flip: bool,
    balanced: bool,
    seed: int,
    progress: Progress | None,
) -> tuple[list[Epoch], dict[str, Scored]]:
    """Train, and return the epochs and the probabilities on val and, looked at this once, test.

    Raises
    ------
    EmbedpipeError    something frozen has moved
    """
    from embedpipe.network import parameter_groups
    from embedpipe.training import moving_names, train

    validations: list[Scored] = []
    done = 0

    def validate() -> Score:
        validations.append(photos.scores(network, "val"))
        return _score(validations[-1], photos.features.classes)

    def on_step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress("finetune", done, photos.steps * epochs)

    still = set(network.state_dict()) - moving_names(network, keep_eval)
    before = _digests(network, still)
    history = train(
        network,
        parameter_groups(network, **rates),
        lambda epoch: photos.shuffled(seed=seed * 100_003 + epoch, flip=flip),
        validate,
        epochs=epochs,
        steps=photos.steps,
        keep_eval=keep_eval,
        class_weight=_class_weight(photos) if balanced else None,
        on_step=on_step,
    )
    moved = [name for name, digest in _digests(network, still).items() if digest != before[name]]
    if moved:
        raise EmbedpipeError(
            f"{len(moved)} frozen tensors moved in training, first {moved[0]}; expected none",
            hint="this is a defect of embedpipe: please report the model and the command",
            moved=moved,
        )
    scored = {"val": validations[_best(history)]}
    if photos.samples("test"):
        scored["test"] = photos.scores(network, "test")
    return history, scored


def _best(history: Sequence[Epoch]) -> int:
    return max(history, key=lambda epoch: (epoch.val_accuracy, -epoch.val_loss)).epoch


def _score(scored: Scored, classes: Sequence[str]) -> Score:
    from embedpipe.metrics import score
    from embedpipe.training import Score

    values = score(scored.probabilities, scored.labels(classes))
    return Score(values["log_loss"], values["accuracy"])


def _class_weight(photos: Photos) -> torch.Tensor:
    import numpy as np
    import torch

    from embedpipe.heads import class_weights

    classes = photos.features.classes
    y = np.array([classes.index(s.label or "") for s in photos.samples("train")])
    weight = class_weights(y, len(classes))
    return torch.as_tensor(weight, dtype=torch.float32, device=photos.forward.device)


def _digests(network: Network, names: set[str]) -> dict[str, str]:
    state = network.state_dict()
    return {name: digest_arrays({name: state[name]}) for name in sorted(names)}


def _describe(network: Network, photos: Photos, unfrozen: Sequence[str], history: Sequence[Epoch]) -> dict[str, Any]:
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    trainable = sum(sizes[name] for name in unfrozen)
    return {
        "dataset": photos.features.dataset,
        "unfrozen": list(unfrozen),
        "trainable_parameters": trainable,
        "frozen_parameters": sum(sizes.values()) - trainable,
        "cut": None,
        "activations": {"cached": False, "rows": 0, "bytes": 0, "reused": 0},
        "epochs": [epoch.to_dict() for epoch in history],
        "best_epoch": _best(history),
        "chosen_on": "val",
        "classes": list(photos.features.classes),
    }


def _save(
    network: Network,
    backbone: Backbone,
    photos: Photos,
    scored: dict[str, Scored],
    report: dict[str, Any],
    runs_dir: Path,
    start: float,
) -> Classifier:
    """Write the run with all its weights, and return the classifier that lies there."""
    from embedpipe.backbones import refresh, save_model
    from embedpipe.classifier import Classifier, Reference, save_run
    from embedpipe.pipeline import space_spec
    from embedpipe.runs import new_run

    network.requires_grad_(False).to("cpu")
    backbone = refresh(backbone, origin=f"fine-tuned from {backbone.origin}")
    head = network.to_head(photos.features.classes)
    reference = Reference(space_spec(backbone, "fp32", "float32"), {"name": "model"})
    tuned = Classifier(head, reference, _backbone=backbone)
    with new_run(runs_dir, "finetune") as run:
        (run.folder / "model").mkdir()
        save_model(backbone, head.weight, head.bias, head.classes, run.folder / "model")
        seconds = time.monotonic() - start
        return save_run(run, "finetune", tuned, photos.features, scored, report, seconds=seconds)

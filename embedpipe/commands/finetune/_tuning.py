"""The work of the deed: take up a head, prove the hand-off, train, prove what is frozen, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedpipe.backbones import Backbone, refresh, save_model
from embedpipe.cache import Cache
from embedpipe.classifier import Classifier, Network, Reference, Scored, save_run
from embedpipe.commands.finetune._activation_cache import Wish, choose_source
from embedpipe.commands.finetune._activations import Activations
from embedpipe.commands.finetune._checks import prove_handoff
from embedpipe.commands.finetune._phases import Course, phases_of
from embedpipe.commands.finetune._photos import Photos, score_batches
from embedpipe.commands.finetune._unfinished import Unfinished
from embedpipe.commands.finetune._wise import sweep
from embedpipe.errors import UsageError
from embedpipe.evaluation import score
from embedpipe.features import PENULTIMATE, FeatureSet
from embedpipe.heads import LinearHead, class_weights
from embedpipe.inference import Progress, plan_forward, space_name, space_spec
from embedpipe.runs import latest_run, new_run
from embedpipe.storage import BYTES, PathLike, parse_amount
from embedpipe.training import Plan, Ranks, Score, Trained


def carry_out(
    unfinished: Unfinished,
    start: Classifier | None,
    cache_dir: Path,
    runs_dir: Path,
    machine: dict[str, Any],
    progress: Progress | None,
) -> Classifier:
    """Do what the options of an unfinished run say, and save it under its name."""

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
    phases = phases_of(options)
    return Wish(
        cached=options["cache_activations"],
        unfreeze=tuple(pattern for phase in phases for pattern in phase["unfreeze"]),
        epochs=sum(phase["epochs"] for phase in phases),
        views=options["views"],
        augment=options["augment"],
        seed=options["seed"],
        max_bytes=parse_amount(options["max_cache_size"], BYTES, "--max-cache-size", "20GB"),
        images_only="--cutmix" if options["cutmix"] else "",
    )


def starting_point(run: Classifier | PathLike | None, runs_dir: Path) -> Classifier:
    """Return the classifier to start from: a linear head on the penultimate layer."""

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
    return starting_point(unfinished.options["run"], runs_dir)


def _head_of(classifier: Classifier) -> LinearHead:
    if not isinstance(classifier.head, LinearHead):
        raise UsageError(
            f"{classifier.name} has a kNN head, expected a linear one to start from",
            hint="run `embedpipe fit-head` without --solver knn",
        )
    return classifier.head


def _features_of(classifier: Classifier, cache: Cache) -> FeatureSet:
    """Return the data set and the space that the head was fitted on."""
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
    values = score(scored.probabilities, scored.labels(classes))
    return Score(values["log_loss"], values["accuracy"])


def _class_weight(photos: Photos | Activations) -> torch.Tensor:

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

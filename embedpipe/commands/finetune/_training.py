"""The work of `finetune`: load the classifier, check the network, train it and save the run."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedpipe.backbones import refresh, save_model
from embedpipe.cache import Cache
from embedpipe.classifier import Classifier, Reference, save_run
from embedpipe.classifier.network import Network
from embedpipe.commands.finetune._caching_policy import choose_source
from embedpipe.commands.finetune._checkpoint import UnfinishedRun
from embedpipe.commands.finetune._phases import PhasedTraining, phases_of
from embedpipe.commands.finetune._sources import ImageSource, score_split
from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.features import PENULTIMATE, FeatureSet
from embedpipe.heads import LinearHead
from embedpipe.inference import Progress, resolve_settings, space_spec
from embedpipe.runs import latest_run, new_run
from embedpipe.storage import PathLike
from embedpipe.training import Plan, Ranks, Trained

TOLERANCE = 1e-3  # of the largest logit, or of 1
ALPHAS = tuple(k / 10 for k in range(11))  # of WiSE-FT


def run_training(
    unfinished: UnfinishedRun,
    start: Classifier | None,
    cache_dir: Path,
    runs_dir: Path,
    machine: dict[str, Any],
    progress: Progress | None,
) -> Classifier:
    """Train as the options of an unfinished run say, and save the run under its name.

    Parameters
    ----------
    start : Classifier    to fine-tune; None: the one that the run started from
    machine : dict        device and workers
    """
    started, options, ranks = time.monotonic(), unfinished.options, unfinished.ranks
    plans = [Plan.of(phase) for phase in phases_of(options)]
    check_ranks(options, ranks)
    if start is None and options["run"] is None:
        hint = "pass it again: finetune(classifier, resume=True)"
        raise UsageError(f"{unfinished.name} started from a classifier that is not in a run", hint=hint)
    classifier = start or load_start(options["run"], runs_dir)
    cache = Cache(cache_dir)
    features = _open_features(classifier, cache)
    forward = resolve_settings(batch_size=options["batch_size"] // ranks.count, **machine)
    if options["precision"] == "fp16" and not forward.device.startswith("cuda"):
        raise UsageError(f"--precision fp16 on {forward.device}, expected cuda", hint="use bf16 or fp32")
    torch.manual_seed(options["seed"])
    backbone = replace(classifier.backbone, module=copy.deepcopy(classifier.backbone.module))
    head = classifier.head
    assert isinstance(head, LinearHead)  # load_start refuses others
    network = Network(backbone.module, head)
    network.to(forward.device).to(memory_format=torch.channels_last)
    images = ImageSource(features, forward, ranks, options["seed"], options["augment"], backbone)
    images.view_transform(1)  # refuses what cannot be augmented
    difference = check_handoff(network, head, images)
    if options["init"] == "random":
        network.head.reset_parameters()
    source, source_report = choose_source(network, images, options, cache, unfinished.source, progress=progress)
    training = PhasedTraining(network, backbone, source, replace(unfinished, source=source_report), progress)
    mode = options["wise_ft"]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()} if mode else {}
    with network.checkpointing(backbone.name) if options["grad_checkpointing"] else nullcontext():
        trained, unfrozen = training.run()
        wise_ft = _interpolate_weights(training, before, keep_best=mode == "auto") if mode else None
    report = {
        "from_run": classifier.report.get("run"),
        "handoff_max_abs_diff": difference,
        "options": dict(options),
        "resumed": unfinished.state is not None,
        "wise_ft": wise_ft,
        **source_report,
        **_describe(training, unfrozen, trained, sum(plan.epochs for plan in plans)),
    }
    tuned = _save(training, report, runs_dir, started) if ranks.first else None
    ranks.broadcast(lambda: "saved")  # the others wait
    return tuned or Classifier.load(runs_dir / unfinished.name)


def check_ranks(options: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse options with which several processes would not compute what one process does."""
    if options["batch_size"] % ranks.count:
        message = f"--batch-size {options['batch_size']} for {ranks.count} processes, expected a multiple"
        raise UsageError(message, hint="it counts the images of all processes together")
    if ranks.count > 1 and any(phase["bn"] == "train" for phase in phases_of(options)):
        raise UsageError(
            "--bn train under torchrun: each process would have its own statistics", hint="use affine or frozen"
        )


def load_start(run: Classifier | PathLike | None, runs_dir: Path) -> Classifier:
    """Return the classifier to fine-tune; default: the latest linear head on the penultimate layer.

    Raises
    ------
    UsageError    the head is not linear, not of one class per image, or on other layers
    """

    def is_suitable(record: Mapping[str, Any]) -> bool:
        reference = record["reference"]
        is_alone = reference["spec"]["layer"] == PENULTIMATE and "beside" not in reference
        return is_alone and record["report"]["solver"] != "knn"

    classifier = Classifier.of(latest_run(runs_dir, "fit-head", is_suitable) if run is None else run, runs_dir)
    if not isinstance(classifier.head, LinearHead):
        hint = "run `embedpipe fit-head` without --solver knn"
        raise UsageError(f"{classifier.name} has a kNN head, expected a linear one to start from", hint=hint)
    if classifier.task != "single":
        message = f"{classifier.name} has {classifier.task} targets, expected one class per image to fine-tune on"
        raise UsageError(message, hint="fit a head on class folders, or on a manifest with a column label")
    layers = [part.spec["layer"] for part in classifier.reference.parts]
    if layers != [PENULTIMATE]:
        raise UsageError(
            f"{classifier.name} is fitted on the layer {' + '.join(layers)}, expected the penultimate features alone",
            hint=f"run `embedpipe extract` without --layer, then `embedpipe fit-head --layer {PENULTIMATE}`",
        )
    return classifier


def _open_features(classifier: Classifier, cache: Cache) -> FeatureSet:
    """Return the cached features that the head was fitted on."""
    features = FeatureSet(cache.read_dataset(classifier.dataset), classifier.reference.space(cache))
    if not {"train", "val"} <= set(features.splits):
        raise UsageError(
            f"{features.dataset} has features of {', '.join(features.splits) or 'no split'} in {features.space.folder}, "
            "expected train and val",
            hint="name the cache with --cache-dir, or extract again",
        )
    return features


def check_handoff(network: Network, head: LinearHead, images: ImageSource) -> float:
    """Return the largest difference between the network's logits and those of the head on cached features.

    Features that are not stored in float32 are computed again.

    Raises
    ------
    ModelMismatch    it is more than 1e-3 x max(1, max |logit|): backbone, transform or head are not those of the cache
    """
    network.eval()
    spec = images.features.space.spec
    is_exact = spec["precision"] == "fp32" and spec["stored_dtype"] == "float32"
    expected, logits = [], []
    with torch.inference_mode():
        for batch, samples in images.probe:
            features = images.features.read(tuple(samples)) if is_exact else network.backbone(batch).cpu().numpy()
            expected.append(head.logits(features))
            logits.append(network(batch).cpu().numpy())
    worst = float(np.abs(np.concatenate(logits) - np.concatenate(expected)).max())
    limit = TOLERANCE * max(1.0, float(np.abs(np.concatenate(expected)).max()))
    if not worst <= limit:
        raise ModelMismatch(
            f"backbone and head give logits that differ by {worst:.2g} from those on the cached features, "
            f"expected at most {limit:.2g}",
            hint="extract and fit the head again",
        )
    return worst


def _interpolate_weights(training: PhasedTraining, before: Mapping[str, Tensor], *, keep_best: bool) -> dict[str, Any]:
    """Score the weights (1 - alpha) * before + alpha * after on val for each alpha, and load those of the chosen alpha.

    Parameters
    ----------
    keep_best : bool    choose the alpha with the best score; else 1, the weights after training

    Returns
    -------
    dict    sweep: [{alpha, val_loss, val_accuracy}]; chosen: alpha

    Source: WiSE-FT, Wortsman et al., CVPR 2022.
    """
    state = training.network.state_dict()
    after = {name: state[name].clone() for name in before}

    def interpolate(alpha: float) -> None:
        for name, start in before.items():
            counter = after[name] if alpha else start
            state[name].copy_(start.lerp(after[name], alpha) if start.is_floating_point() else counter)

    scores = {}
    for alpha in ALPHAS:
        interpolate(alpha)
        scores[alpha] = training.validate()
    chosen = max(ALPHAS, key=lambda alpha: scores[alpha].rank) if keep_best else 1.0
    interpolate(chosen)
    rows = [{"alpha": alpha, "val_loss": s.loss, "val_accuracy": s.accuracy} for alpha, s in scores.items()]
    return {"sweep": rows, "chosen": chosen}


def _describe(training: PhasedTraining, unfrozen: Sequence[str], trained: Trained, epochs: int) -> dict[str, Any]:
    """Return the part of the report on the parameters and epochs that were trained; `epochs` were planned."""
    sizes = {name: p.numel() for name, p in training.network.named_parameters()}
    features = training.source.features
    trainable = sum(sizes[name] for name in unfrozen)
    return {
        "dataset": features.dataset,
        "unfrozen": list(unfrozen),
        "trainable_parameters": trainable,
        "frozen_parameters": sum(sizes.values()) - trainable,
        "epochs": [asdict(epoch) for epoch in trained.history],
        "best_epoch": trained.best_epoch,
        "best_of": trained.best_of,
        "stopped": trained.diverged or ("patience" if len(trained.history) <= epochs else None),
        "chosen_on": "val",
        "classes": list(features.classes),
    }


def _save(training: PhasedTraining, report: dict[str, Any], runs_dir: Path, started: float) -> Classifier:
    """Write the run with all weights, and return its classifier."""
    network, source, backbone = training.network, training.source, training.backbone
    scored = {split: score_split(network, source, split) for split in ("val", "test") if source.samples(split)}
    network.requires_grad_(False).to("cpu")
    backbone = refresh(backbone, origin=f"fine-tuned from {backbone.origin}")
    head = network.to_head(source.features.classes)
    reference = Reference(space_spec(backbone, "fp32", "float32"), {"name": "model"})
    tuned = Classifier(head, reference, _backbone=backbone)
    with new_run(runs_dir, "finetune", name=training.unfinished.name) as run:
        (run.folder / "model").mkdir()
        save_model(backbone, head.weight, head.bias, head.classes, run.folder / "model")
        seconds = time.monotonic() - started
        return save_run(run, "finetune", tuned, source.features, scored, report, seconds=seconds)

"""The deed: compose backbone and head, write them in a format, open what was written, compare its logits with our own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from torch import Tensor

    from embedpipe.classifier import Classifier
    from embedpipe.commands.export._formats import Format
    from embedpipe.heads import LinearHead

TOLERANCE = 1e-4  # of the largest logit, or of 1
PROBABILITIES = {
    "single": "softmax of the logits",
    "multilabel": "sigmoid of each logit, a label for itself",
    "regression": "none: the logit is the number",
}
IMAGES = 8


@dataclass(frozen=True)
class Exported:
    """What was written.

    folder : str            with `files` in it
    max_abs_diff : float    of the logits, between what was written and opened again, and our own classifier
    checked_on : str        "dataset", or "random" where no image of the run's data set could be read
    images : int            how many
    """

    format: str
    folder: str
    files: tuple[str, ...]
    max_abs_diff: float
    checked_on: str
    images: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "files": list(self.files)}


def export(
    run: Classifier | PathLike,
    *,
    format: Literal["timm", "torch", "onnx"] = "timm",
    output: str | None = None,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
) -> Exported:
    """Write backbone and head as one model that needs no embedpipe, and prove that it gives the same logits.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run
    format : str
        timm (a folder for the backbone's own library, timm or torchvision), torch (a .pt2 program) or onnx.
    output : str
        The folder to make. Default: run and format in the present folder.

    Raises
    ------
    UsageError       no linear head, a model that does not fit the format, a missing library, an output that is there
    ModelMismatch    what was written gives other logits; nothing is left of it
    StorageError     disk full, permission, input/output
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier
    from embedpipe.commands.export._formats import FORMATS
    from embedpipe.storage import whole_folder

    form = FORMATS[format]
    form.check_installed()
    run = Classifier.of(run, runs_dir)
    folder = Path(output or f"{run.folder.name if run.folder else 'classifier'}-{format}").absolute()
    if os.path.lexists(folder):
        raise UsageError(f"{folder} is there already", hint="name another folder with --output, or remove it")
    head = _linear_head(run)
    images, checked_on = _images_of(run, Cache(Path(cache_dir)))
    with whole_folder(folder) as fresh:
        form.write(run.backbones, head, fresh)
        _write_json(fresh / "labels.json", list(head.classes))
        _write_json(fresh / "preprocessing.json", _describe(run))
        difference = _largest_difference(form, fresh, run, head, images)
        files = tuple(sorted(path.name for path in fresh.iterdir()))
    return Exported(format, str(folder), files, difference, checked_on, len(images))


def _linear_head(classifier: Classifier) -> LinearHead:
    from embedpipe.heads import LinearHead

    if isinstance(classifier.head, LinearHead):
        return classifier.head
    raise UsageError(
        f"{classifier.name} has a kNN head, expected a linear one to export",
        hint="run `embedpipe fit-head` without --solver knn",
    )


def _images_of(classifier: Classifier, cache: Any) -> tuple[Tensor, str]:
    """Return images float32 (n, 3, H, W) from all over the run's data set, as the backbone takes them, or random ones."""
    import torch

    from embedpipe.images import Transform, image_batches

    transform = classifier.backbone.transform
    try:
        manifest = cache.read_dataset(classifier.dataset) if classifier.dataset else None
    except UsageError:  # extracted into another cache
        manifest = None
    samples = manifest.samples if manifest else ()
    some = samples[:: max(1, len(samples) // IMAGES)][:IMAGES]
    items = [(sample.key, manifest.place_of(sample)) for sample in some if manifest]
    for batch in image_batches(items, [transform], batch_size=IMAGES, workers=1):
        if batch.keys:
            images = torch.from_numpy(batch.images[0])
            return (transform.normalise(images) if isinstance(transform, Transform) else images), "dataset"
    shape = (IMAGES, 3, *classifier.backbone.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), "random"


def _largest_difference(form: Format, folder: Path, classifier: Classifier, head: LinearHead, images: Tensor) -> float:
    """Return the largest difference of logits between what is opened again and the run, in a batch and of an image alone."""
    import numpy as np
    import torch

    from embedpipe.commands.export._formats import refusals

    with torch.inference_mode():
        own = head.logits(np.hstack([one.module.cpu()(images).numpy() for one in classifier.backbones]))
        with refusals(classifier.backbone.name):
            logits = form.open(folder)
            there = [logits(images), logits(images[:1])]
    difference = max(float(np.abs(some - own[: len(some)]).max()) for some in there)
    allowed = TOLERANCE * max(1.0, float(np.abs(own).max()))
    if not difference <= allowed:
        raise ModelMismatch(
            f"what was written gives logits {difference:.2g} away from those of {classifier.name}, "
            f"expected at most {allowed:.2g}",
            hint="try another --format",
            max_abs_diff=difference,
        )
    return difference


def _describe(classifier: Classifier) -> dict[str, Any]:
    """Return what goes in, what comes out, and how an image becomes what goes in."""
    from embedpipe.images import Transform

    backbone = classifier.backbone
    transform = backbone.transform
    return {
        "input": {"name": "images", "dtype": "float32", "shape": ["N", 3, *backbone.image_size]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["N", len(classifier.classes)]},
        "task": classifier.head.task,
        "probabilities": PROBABILITIES[classifier.head.task],
        "steps": transform.describe() if isinstance(transform, Transform) else [repr(transform)],
        "transform": backbone.spec["transform"],
        "backbone": backbone.name,
        "run": classifier.name,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")

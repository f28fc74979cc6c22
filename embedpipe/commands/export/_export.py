"""The command `export`: write backbone and head in a format, open the result and compare its logits with the run's."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.classifier import Classifier

PROBABILITIES = {
    "single": "softmax of the logits",
    "multilabel": "sigmoid of each logit, a label for itself",
    "regression": "none: the logit is the number",
}


@dataclass(frozen=True)
class Exported:
    """The exported model.

    folder : str            that holds `files`
    max_abs_diff : float    between the logits of the exported model and those of the run
    checked_on : str        "dataset", or "random" if no image of the run's data set could be read
    images : int            number of images that were compared
    """

    format: str
    folder: str
    files: tuple[str, ...]
    max_abs_diff: float
    checked_on: str
    images: int


def export(
    run: Classifier | PathLike,
    *,
    format: Literal["timm", "torch", "onnx"] = "timm",
    output: str | None = None,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
) -> Exported:
    """Write backbone and head as one model that can be used without embedpipe, and check that it gives the same logits.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run
    format : str
        timm (a folder for the backbone's own library, timm or torchvision), torch (a .pt2 program) or onnx.
    output : str
        Folder to create. Default: run and format in the current folder.

    Raises
    ------
    UsageError       the head is not linear, the format does not support the model, a library is missing, or the output exists
    ModelMismatch    the exported model gives other logits; it is removed
    StorageError     disk full, permission, input/output
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier
    from embedpipe.commands.export._formats import FORMATS, check_logits, check_onnx, read_images
    from embedpipe.heads import LinearHead
    from embedpipe.storage import atomic_folder

    writer = FORMATS[format]
    if format == "onnx":
        check_onnx()
    run = Classifier.of(run, runs_dir)
    folder = Path(output or f"{run.folder.name if run.folder else 'classifier'}-{format}").absolute()
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists already", hint="name another folder with --output, or remove it")
    if not isinstance(run.head, LinearHead):
        hint = "run `embedpipe fit-head` without --solver knn"
        raise UsageError(f"{run.name} has a kNN head, expected a linear one to export", hint=hint)
    images, checked_on = read_images(run, Cache(Path(cache_dir)))
    with atomic_folder(folder) as temporary:
        writer.write(run.backbones, run.head, temporary)
        for name, content in (("labels", list(run.head.classes)), ("preprocessing", _describe_model(run))):
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        difference = check_logits(writer, temporary, run, run.head, images)
        files = tuple(sorted(path.name for path in temporary.iterdir()))
    return Exported(format, str(folder), files, difference, checked_on, len(images))


def _describe_model(classifier: Classifier) -> dict[str, Any]:
    """Return inputs, outputs and preprocessing of the exported model, the content of preprocessing.json."""
    from embedpipe.images import Transform

    backbone, task = classifier.backbone, classifier.head.task
    transform = backbone.transform
    return {
        "input": {"name": "images", "dtype": "float32", "shape": ["N", 3, *backbone.image_size]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["N", len(classifier.classes)]},
        "task": task,
        "probabilities": PROBABILITIES[task],
        "steps": transform.describe() if isinstance(transform, Transform) else [repr(transform)],
        "transform": backbone.spec["transform"],
        "backbone": backbone.name,
        "run": classifier.name,
    }

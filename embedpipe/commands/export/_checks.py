"""Compare the logits of an exported model with those of the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedpipe.cache import Cache
from embedpipe.classifier import Classifier
from embedpipe.commands.export._formats import Format, library_errors
from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.heads import LinearHead
from embedpipe.images import Transform, image_batches

TOLERANCE = 1e-4  # of the largest logit, or of 1
IMAGES = 8


def read_images(classifier: Classifier, cache: Cache) -> tuple[Tensor, str]:
    """Return images float32 (n, 3, H, W) of the run's data set and "dataset"; if none can be read random ones, "random"."""
    transform, samples = classifier.backbone.transform, []
    try:
        manifest = cache.read_dataset(classifier.dataset) if classifier.dataset else None
    except UsageError:  # extracted into another cache
        manifest = None
    if manifest:
        step = max(1, len(manifest.samples) // IMAGES)
        samples = [(sample.key, manifest.place_of(sample)) for sample in manifest.samples[::step][:IMAGES]]
    for batch in image_batches(samples, [transform], batch_size=IMAGES, workers=1):
        if batch.keys:
            images = torch.from_numpy(batch.images[0])
            return (transform.normalise(images) if isinstance(transform, Transform) else images), "dataset"
    shape = (IMAGES, 3, *classifier.backbone.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), "random"


def check_logits(writer: Format, folder: Path, classifier: Classifier, head: LinearHead, images: Tensor) -> float:
    """Return the largest difference between the logits of the exported model and of the run, in a batch and one by one.

    Raises
    ------
    ModelMismatch    it is more than 1e-4 x max(1, max |logit|)
    """
    with torch.inference_mode():
        expected = head.logits(np.hstack([backbone.module.cpu()(images).numpy() for backbone in classifier.backbones]))
        with library_errors(classifier.backbone.name):
            model = writer.open(folder)
            results = [model(images), model(images[:1])]
    difference = max(float(np.abs(logits - expected[: len(logits)]).max()) for logits in results)
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= limit:
        raise ModelMismatch(
            f"the exported model gives logits that differ by {difference:.2g} from those of {classifier.name}, "
            f"expected at most {limit:.2g}",
            hint="try another --format",
            max_abs_diff=difference,
        )
    return difference

"""Export formats: each writes backbone and head into a folder, and opens the result; its logits are compared with the run's.

>>> FORMATS["torch"].write(classifier.backbones, classifier.head, folder)
>>> FORMATS["torch"].open(folder)(images)          # float32 (N, 3, H, W) -> logits (N, C)
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, FeatureExtractor, open_saved_model, save_model
from embedpipe.cache import Cache
from embedpipe.classifier import Classifier
from embedpipe.classifier.network import Network
from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.heads import LinearHead
from embedpipe.images import Transform, image_batches

PROGRAM, GRAPH = "model.pt2", "model.onnx"
ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of the largest logit, or of 1
IMAGES = 8
LARGE_BYTES = 1 << 30  # of weights; a protobuf file holds at most 2 GiB
Logits = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Format:
    """Functions that write a model into a folder and open it."""

    write: Callable[[Sequence[Backbone], LinearHead, Path], None]
    open: Callable[[Path], Logits]


class JointBackbone(nn.Module):
    """Images -> features of one or several layers of a model, concatenated."""

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        taps = [backbone.module.hooks for backbone in backbones]
        self.extractor = FeatureExtractor(backbones[0].module.model, *taps, stop=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.extractor(images)
        return torch.cat(features, 1) if isinstance(features, tuple) else features


def write_model(backbones: Sequence[Backbone], head: LinearHead, folder: Path) -> None:
    """Write a model of the backbone's own library, with the head as its classifier.

    Raises
    ------
    UsageError    the head is not on the input of the model's classifier
    """
    is_penultimate = len(backbones) == 1 and not backbones[0].module.hooks
    if not (is_penultimate and save_model(backbones[0], head.weight, head.bias, head.classes, folder)):
        layers = " + ".join(backbone.spec["layer"] for backbone in backbones)
        raise UsageError(
            f"{backbones[0].name} has no place for a head on the layer {layers}, expected one linear classifier on it",
            hint="use --format torch or onnx",
        )


def open_model(folder: Path) -> Logits:
    model = open_saved_model(folder)
    return lambda images: model(images).numpy()


def write_program(backbones: Sequence[Backbone], head: LinearHead, folder: Path) -> None:
    """Write a program of torch.export."""
    program = trace_program(backbones, head)
    with library_errors(backbones[0].name):
        torch.export.save(program, folder / PROGRAM)


def trace_program(backbones: Sequence[Backbone], head: LinearHead) -> torch.export.ExportedProgram:
    """Return the graph from images to logits, for any number of images.

    Raises
    ------
    UsageError    the backbones are different models, or torch.export cannot trace the model
    """
    first = backbones[0]
    if any(one.module.model is not first.module.model or one.transform != first.transform for one in backbones):
        message = f"the head is fitted on {len(backbones)} backbones, expected one model and one transform to export"
        raise UsageError(message, hint="fit a head on one of them: `embedpipe fit-head --backbone NAME`")
    network = Network(JointBackbone(backbones), head).requires_grad_(False).cpu().eval()
    example = torch.zeros(2, 3, *first.image_size)
    with library_errors(first.name), torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes={"images": {0: torch.export.Dim("N")}})


@contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Turn the errors that the libraries raise for a model into a UsageError of one line, and suppress their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (RuntimeError, ValueError, TypeError, AssertionError) as exc:
            reason = (str(exc).strip() or type(exc).__name__).partition("\n")[0]
            raise UsageError(f"cannot export {name} in this format: {reason}", hint="try another --format") from exc


def open_program(folder: Path) -> Logits:
    module = torch.export.load(folder / PROGRAM).module()
    return lambda images: module(images).numpy()


def check_onnx() -> None:
    """Raise UsageError if a library for ONNX is missing."""
    missing = [name for name in ONNX_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}", hint="pip install 'embedpipe[onnx]'")


def write_graph(backbones: Sequence[Backbone], head: LinearHead, folder: Path) -> None:
    """Write an ONNX graph with input `images` and output `logits`; very large weights go into a second file."""
    program = trace_program(backbones, head)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with library_errors(backbones[0].name):
        torch.onnx.export(
            program,
            f=folder / GRAPH,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            external_data=size > LARGE_BYTES,
            verbose=False,
        )


def open_graph(folder: Path) -> Logits:
    """Return a function from images to logits; it raises RuntimeError if ONNX Runtime rejects the graph."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as of

    def logits(images: Tensor) -> np.ndarray:
        try:
            session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
            return np.asarray(session.run(["logits"], {"images": images.numpy()})[0])
        except (of.Fail, of.InvalidGraph, of.InvalidProtobuf, of.NotImplemented, of.RuntimeException) as exc:
            raise RuntimeError(exc) from exc

    return logits


FORMATS = {
    "timm": Format(write_model, open_model),
    "torch": Format(write_program, open_program),
    "onnx": Format(write_graph, open_graph),
}


def read_images(classifier: Classifier, cache: Cache) -> tuple[Tensor, str]:
    """Return images float32 (n, 3, H, W) of the run's data set and "dataset"; if none can be read random ones, "random"."""
    transform, samples = classifier.backbone.transform, []
    with suppress(UsageError):  # extracted into another cache
        if classifier.dataset:
            manifest = cache.read_dataset(classifier.dataset)
            step = max(1, len(manifest.samples) // IMAGES)
            samples = [(sample.key, manifest.byte_source_of(sample)) for sample in manifest.samples[::step][:IMAGES]]
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

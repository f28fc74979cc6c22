"""The formats: each writes a backbone and its head into a folder, and opens what lies there.

>>> FORMATS["torch"].write(classifier.backbones, classifier.head, folder)
>>> FORMATS["torch"].open(folder)(images)          # float32 (N, 3, H, W) -> logits (N, C)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, Headless, open_whole, save_model
from embedpipe.classifier import Network
from embedpipe.commands.export import _onnx
from embedpipe.errors import UsageError
from embedpipe.heads import LinearHead

PROGRAM, GRAPH = "model.pt2", "model.onnx"


@dataclass(frozen=True)
class Format:
    """write(backbones, head, folder), open(folder) -> a function from images to logits, and what they need."""

    write: Callable[[Sequence[Backbone], LinearHead, Path], None]
    open: Callable[[Path], Callable[[Tensor], np.ndarray]]
    check_installed: Callable[[], None] = lambda: None


class SideBySide(nn.Module):
    """Images to the features of one or several layers of a model, in a row."""

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        groups = [backbone.module.taps for backbone in backbones]
        self.headless = Headless(backbones[0].module.model, *groups, stop=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.headless(images)
        return torch.cat(features, 1) if isinstance(features, tuple) else features


def compose(backbones: Sequence[Backbone], head: LinearHead) -> Network:
    """Return backbones and head as one module in eval mode."""
    first = backbones[0]
    if any(one.module.model is not first.module.model or one.transform != first.transform for one in backbones):
        raise UsageError(
            f"the head is fitted on {len(backbones)} backbones, expected one model and one transform to export",
            hint="fit a head on one of them: `embedpipe fit-head --backbone NAME`",
        )
    return Network(SideBySide(backbones), head).requires_grad_(False).cpu().eval()


def write_model(backbones: Sequence[Backbone], head: LinearHead, folder: Path) -> None:
    """Write what the backbone's own library opens, its classifier replaced by the head."""
    alone = len(backbones) == 1 and not backbones[0].module.taps
    if not (alone and save_model(backbones[0], head.weight, head.bias, head.classes, folder)):
        layers = " + ".join(one.spec["layer"] for one in backbones)
        raise UsageError(
            f"{backbones[0].name} has no place for a head on the layer {layers}, expected one linear classifier on it",
            hint="use --format torch or onnx",
        )


def open_model(folder: Path) -> Callable[[Tensor], np.ndarray]:
    model = open_whole(folder)
    return lambda images: model(images).numpy()


def write_program(backbones: Sequence[Backbone], head: LinearHead, folder: Path) -> None:
    """Write a program of torch.export.

    Raises
    ------
    UsageError    torch cannot record this model for any number of images
    """
    program = record_program(backbones, head)
    with refusals(backbones[0].name):
        torch.export.save(program, folder / PROGRAM)


def record_program(backbones: Sequence[Backbone], head: LinearHead) -> torch.export.ExportedProgram:
    """Return the graph from images to logits; the number of images is left open."""
    network = compose(backbones, head)
    example = torch.zeros(2, 3, *backbones[0].image_size)
    with refusals(backbones[0].name), torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes={"images": {0: torch.export.Dim("N")}})


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turn what the libraries raise of a model into one line, and leave out what they warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (RuntimeError, ValueError, TypeError, AssertionError) as exc:
            reason = (str(exc).strip() or type(exc).__name__).partition("\n")[0]
            raise UsageError(f"{name} cannot leave in this format: {reason}", hint="try another --format") from exc


def open_program(folder: Path) -> Callable[[Tensor], np.ndarray]:
    module = torch.export.load(folder / PROGRAM).module()
    return lambda images: module(images).numpy()


def write_graph(backbones: Sequence[Backbone], head: LinearHead, folder: Path) -> None:
    """Write a graph of ONNX.

    Raises
    ------
    UsageError    torch or ONNX cannot express this model
    """
    program = record_program(backbones, head)
    with refusals(backbones[0].name):
        _onnx.write(program, folder / GRAPH)


FORMATS = {
    "timm": Format(write_model, open_model),
    "torch": Format(write_program, open_program),
    "onnx": Format(write_graph, lambda folder: _onnx.open_graph(folder / GRAPH), _onnx.check_installed),
}

"""The door to ONNX: torch writes the graph, ONNX Runtime runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedpipe.errors import UsageError

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 1 << 30  # bytes of weights; a file of protobuf ends at 2 GiB


def check_installed() -> None:
    """Raise a UsageError where a library is missing."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}", hint="pip install 'embedpipe[onnx]'")


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as ONNX, input `images`, output `logits`; very large weights into a file beside it."""
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    torch.onnx.export(
        program,
        f=path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=size > ONE_FILE,
        verbose=False,
    )


def open_graph(path: Path) -> Callable[[Tensor], np.ndarray]:
    """Return a function from images to logits; it raises RuntimeError where ONNX Runtime refuses the graph."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as of

    def logits(images: Tensor) -> np.ndarray:
        try:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return np.asarray(session.run(["logits"], {"images": images.numpy()})[0])
        except (of.Fail, of.InvalidGraph, of.InvalidProtobuf, of.NotImplemented, of.RuntimeException) as exc:
            raise RuntimeError(exc) from exc

    return logits

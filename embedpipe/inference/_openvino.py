"""OpenVino: the executor that compiles the graph of a module for this CPU. Converted graphs are stored in the cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.errors import StorageError, UsageError
from embedpipe.inference._settings import InferenceSettings
from embedpipe.provenance import fingerprint, library_version
from embedpipe.storage import atomic_folder

if TYPE_CHECKING:
    from embedpipe.backbones import SharedModel


def has_openvino() -> bool:
    """Return True if OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class OpenVino:
    """An `Executor` of OpenVINO, fp32, with one thread a call.

    Parameters
    ----------
    shared_models : list of SharedModel
    settings : InferenceSettings        batch size: images a call; streams: calls at the same time; graphs

    Raises
    ------
    UsageError    OpenVINO is not installed
    RuntimeError  OpenVINO cannot convert a model
    """

    def __init__(self, shared_models: Sequence[SharedModel], settings: InferenceSettings) -> None:
        if not has_openvino():
            raise UsageError("the executor openvino is not installed", hint="pip install 'embedpipe[openvino]'")
        import openvino

        core = openvino.Core()
        options: dict[str, Any] = {
            "NUM_STREAMS": settings.streams,
            "INFERENCE_NUM_THREADS": settings.streams,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
        }
        self._compiled = []
        for shared_model in shared_models:
            graph = _graph(core, shared_model, settings.graphs)
            graph.reshape([settings.batch_size, *shared_model.example(1).shape[1:]])
            self._compiled.append(core.compile_model(graph, "CPU", options))
        self._own = threading.local()

    def __call__(self, shared_model: int, images: np.ndarray) -> list[np.ndarray]:
        if not hasattr(self._own, "requests"):
            self._own.requests = [compiled.create_infer_request() for compiled in self._compiled]
        outputs = self._own.requests[shared_model].infer([images], share_inputs=True)
        return [np.array(features) for features in outputs.to_tuple()]


def _graph(core: Any, shared_model: SharedModel, graphs: Path | None) -> Any:
    """Return the graph of a shared_model, from its file, or converted and stored.

    It is always read from a file: a graph has other last bits before it is stored and read.
    """
    if graphs is None:
        with TemporaryDirectory() as folder:
            return _graph(core, shared_model, Path(folder))
    stored = graphs / graph_name([shared_model])
    with suppress(RuntimeError, OSError):  # absent or damaged
        graph = core.read_model(stored / "graph.xml")
        os.utime(stored)  # the time of the last use, for `cache gc`
        return graph
    _convert(shared_model, stored)
    return core.read_model(stored / "graph.xml")


def _convert(shared_model: SharedModel, folder: Path) -> None:
    """Convert a shared model and store its graph, whole or not at all.

    Raises
    ------
    StorageError    the disk is full or refuses
    """
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes become constants, as intended
        graph = openvino.convert_model(shared_model.cpu(), example_input=shared_model.example(2))
    shutil.rmtree(folder, ignore_errors=True)  # a damaged graph
    try:
        with atomic_folder(folder, what="graph") as fresh:
            openvino.save_model(graph, fresh / "graph.xml", compress_to_fp16=False)
    except StorageError:
        if not (folder / "graph.xml").exists():  # else another process has stored the same graph
            raise


def graph_name(shared_models: Sequence[SharedModel]) -> str:
    """Return the name of the graph of shared models: a hash of their specs and the library versions."""
    versions = [library_version(library) for library in ("openvino", "torch")]
    return fingerprint([versions, [shared_model.spec for shared_model in shared_models]])[:24]

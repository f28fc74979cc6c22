"""Where a thing comes from: canonical JSON, fingerprints, digests and the environment.

Any room may enter. Nothing here imports torch.

>>> fingerprint({"architecture": "resnet18"})[:12]
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from typing import Any

LIBRARIES = ("embedpipe", "torch", "torchvision", "timm", "numpy", "h5py", "pillow", "scikit-learn")


def canonical_json(value: Any) -> str:
    """Write JSON in the one form that is hashed: sorted keys, no blanks, ASCII, no NaN.

    Raises
    ------
    ValueError    NaN or infinity
    TypeError     not JSON-able
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(spec: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of `spec`, 64 hex digits."""
    return hashlib.sha256(canonical_json(spec).encode()).hexdigest()


def digest_arrays(named: Mapping[str, Any]) -> str:
    """Return one sha256 over names, dtypes, shapes and bytes of arrays, in order of their names.

    Parameters
    ----------
    named : mapping of str to numpy.ndarray or torch.Tensor
    """
    total = hashlib.sha256()
    for name in sorted(named):
        array = named[name]
        if hasattr(array, "detach"):
            array = array.detach().cpu().contiguous()
            dtype, shape = str(array.dtype).removeprefix("torch."), list(array.shape)
            array = _tensor_bytes(array)
        else:
            dtype, shape = str(array.dtype), list(array.shape)
            array = memoryview(array.copy(order="C")).cast("B") if array.size else b""
        total.update(canonical_json([name, dtype, shape]).encode())
        total.update(array)
    return total.hexdigest()


def _tensor_bytes(tensor: Any) -> Any:
    import torch

    if tensor.numel() == 0:
        return b""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def environment(device: str = "cpu") -> dict[str, str]:
    """Return library versions, platform and device: what is recorded beside features, never hashed."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {**versions, "python": platform.python_version(), "machine": platform.machine(), "device": device}


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names that look most like `name`, best first."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)

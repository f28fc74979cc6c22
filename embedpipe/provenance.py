"""Where a thing comes from: canonical JSON, fingerprints, digests and the environment.

Any room may enter. Nothing here imports torch.

>>> fingerprint({"architecture": "resnet18"})[:12]
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

LIBRARIES = ("embedpipe", "torch", "torchvision", "timm", "numpy", "h5py", "pillow", "scikit-learn")
ABSENT = "(absent)"


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


class Difference(NamedTuple):
    """A field of two specs, dotted, that is `old` in one and `new` in the other; "(absent)" where there is none."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.old)} -> {_shown(self.new)}"


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the fields in which two specs differ, sorted, those of inner mappings by their dotted names.

    >>> differing_fields({"transform": {"crop_size": 224}}, {"transform": {"crop_size": 96}})
    [Difference(field='transform.crop_size', old=224, new=96)]
    """
    before, after = (dict(_flat(json.loads(canonical_json(spec)))) for spec in (old, new))
    return [
        Difference(name, before.get(name, ABSENT), after.get(name, ABSENT))
        for name in sorted({*before, *after})
        if canonical_json(before.get(name, ABSENT)) != canonical_json(after.get(name, ABSENT))
    ]


def _flat(spec: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in spec.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    """Show a value on one line; of a digest its first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


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


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the three names that look most like `name`, best first."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)

"""Provenance: canonical JSON, fingerprints of specs, digests of arrays, and the software environment.

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
    """Return JSON in the canonical form that is hashed: sorted keys, no whitespace, ASCII.

    Raises
    ------
    ValueError    `value` has NaN or infinity
    TypeError     `value` cannot be written as JSON
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON of a value, such as a spec, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class Difference(NamedTuple):
    """A dotted field whose value is `old` in one spec and `new` in another; "(absent)" stands for a missing value."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_format(self.old)} -> {_format(self.new)}"


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the fields in which two specs differ, sorted; fields of nested mappings have dotted names.

    >>> differing_fields({"transform": {"crop_size": 224}}, {"transform": {"crop_size": 96}})
    [Difference(field='transform.crop_size', old=224, new=96)]
    """
    before, after = (dict(_flatten(json.loads(canonical_json(spec)))) for spec in (old, new))
    return [
        Difference(name, before.get(name, ABSENT), after.get(name, ABSENT))
        for name in sorted({*before, *after})
        if canonical_json(before.get(name, ABSENT)) != canonical_json(after.get(name, ABSENT))
    ]


def _flatten(spec: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in spec.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _format(value: Any) -> str:
    """Format a value on one line; digests are cut to 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def digest_arrays(named: Mapping[str, Any]) -> str:
    """Return the sha256 over the names, dtypes, shapes and bytes of arrays, sorted by name.

    Parameters
    ----------
    named : mapping of str to numpy.ndarray or torch.Tensor
    """
    total = hashlib.sha256()
    for name, array in sorted(named.items()):
        if hasattr(array, "detach"):
            import torch

            array = array.detach().cpu().contiguous()
            raw = array.reshape(-1).view(torch.uint8).numpy()
        else:
            raw = array.tobytes()
        dtype = str(array.dtype).removeprefix("torch.")
        total.update(canonical_json([name, dtype, list(array.shape)]).encode())
        total.update(raw)
    return total.hexdigest()


def environment(device: str = "cpu") -> dict[str, str]:
    """Return the library versions, platform and device to record with features; they are not part of a fingerprint."""
    versions = {name: library_version(name) for name in LIBRARIES}
    return {**versions, "python": platform.python_version(), "machine": platform.machine(), "device": device}


def library_version(name: str) -> str:
    """Return the version of an installed package, "absent" if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three of `names` that are spelled most like `name`, best first."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)

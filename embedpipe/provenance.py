"""Where a thing comes from: canonical JSON, fingerprints, digests, the environment, and files written whole.

Any room may enter. Nothing here imports torch.

>>> fingerprint({"architecture": "resnet18"})[:12]
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embedpipe.errors import StorageError

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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole: temporary name, fsync, rename, fsync of the folder.

    Raises
    ------
    StorageError    the operating system refused (disk full, permission, input/output)
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.rename(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(
            f"could not write {path}: {exc.strerror or exc}",
            hint="free some space or check the permissions, then run the same command again",
            path=str(path),
        ) from exc


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names that look most like `name`, best first."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)

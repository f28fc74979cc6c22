"""A head on disk: `head.safetensors` (arrays) and `head.json` (everything else), read with NumPy alone.

`head.json` is written last and holds the digest of the arrays, so that a partly overwritten head is detected.

>>> save_head(folder, {"kind": "linear", "classes": ["a", "b"]}, {"weight": W, "bias": b})
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from embedpipe.errors import ModelMismatch, StorageError, UsageError
from embedpipe.provenance import digest_arrays
from embedpipe.storage import write_atomic

ARRAYS, RECORD, FORMAT_VERSION = "head.safetensors", "head.json", 1
Arrays = dict[str, NDArray[Any]]


def save_head(folder: Path, record: Mapping[str, Any], arrays: Arrays) -> None:
    """Write arrays, then the record with their digest.

    Raises
    ------
    StorageError    the operating system refused
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    full = {"format_version": FORMAT_VERSION, **record, "digest": digest_arrays(arrays)}
    write_atomic(folder / ARRAYS, safetensors.save(arrays))
    write_atomic(folder / RECORD, (json.dumps(full, indent=2, allow_nan=False) + "\n").encode())


def read_record(folder: Path) -> dict[str, Any]:
    """Read `head.json`.

    Raises
    ------
    UsageError       no head in the folder
    ModelMismatch    not the record of a head, or of a newer format
    """
    content = _read(folder / RECORD)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise ModelMismatch(f"{folder / RECORD} is not JSON: {exc}", hint="fit the head again") from exc
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        hint = "read it with the embedpipe that wrote it, or fit the head again"
        raise ModelMismatch(f"{folder / RECORD} has format {version}, expected {FORMAT_VERSION}", hint=hint)
    return dict(record)


def read_head(folder: Path, kind: str, names: Sequence[str]) -> tuple[dict[str, Any], Arrays]:
    """Read the record and the named arrays of a head of this kind.

    Raises
    ------
    UsageError       no head in the folder
    ModelMismatch    a head of another kind, or arrays that do not match the record
    """
    record = read_record(folder)
    if record.get("kind") != kind:
        raise ModelMismatch(f"a {record.get('kind')} head in {folder}, expected a {kind} head")
    try:
        arrays = safetensors.load(_read(folder / ARRAYS))
    except SafetensorError as exc:
        raise ModelMismatch(f"{folder / ARRAYS} is damaged: {exc}", hint="fit it again") from exc
    if digest_arrays(arrays) != record.get("digest"):
        raise ModelMismatch(f"{folder / ARRAYS} is not what {RECORD} describes", hint="fit the head again")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ModelMismatch(f"{folder / ARRAYS} has no {missing[0]}, expected a {kind} head", hint="fit the head again")
    return record, arrays


def entry(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return an entry of a record.

    Raises
    ------
    ModelMismatch    it is missing or of another type
    """
    found = record.get(name)
    found = float(found) if kind is float and type(found) is int else found
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ModelMismatch(f"{RECORD} has {name} {found!r}, expected {kind.__name__}", hint="fit the head again")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise UsageError(f"no {path.name} in {path.parent}", hint="name a run of fit-head") from exc
    except OSError as exc:
        raise StorageError(f"could not read {path}: {exc.strerror}", path=str(path)) from exc

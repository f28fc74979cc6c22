"""The structure of an untrusted HDF5 file: its attributes, and where the bytes of each array are.

Accepted are plain attributes and contiguous, unfiltered arrays inside the file. Links, virtual, external, chunked or
compressed arrays are errors, so a crafted file cannot make HDF5 open another file or allocate more than it stores.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from embedpipe.errors import CacheMismatch

Array = np.ndarray[Any, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Schema = Mapping[str, tuple[str, int]]


class ArrayInfo(NamedTuple):
    """Name, shape and dtype of an array, and the position and number of its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0
    stored_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes that shape and dtype amount to."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, mapped: Bytes) -> Array:
        """Return a copy of the array from the bytes of the file."""
        raw = mapped[self.offset : self.offset + self.stored_bytes].tobytes()
        return np.frombuffer(raw, self.dtype).reshape(self.shape)


def read_structure(
    stream: IO[bytes], path: Path, schema: Schema, *, file_bytes: int, optional: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, ArrayInfo]]:
    """Return the attributes of a file, and the description of each array; the arrays are not read.

    Parameters
    ----------
    schema : mapping of array name to (dtypes such as "f4|f2", or "S"; number of dimensions)
    optional : names of arrays that may be absent

    Raises
    ------
    CacheMismatch    not HDF5; links; virtual, external, chunked or filtered arrays; attributes that are not scalar; other
                     arrays than those of the schema
    """
    import h5py

    try:
        with h5py.File(stream, "r") as file:
            attrs = {name: _attribute(file, name, path) for name in file.attrs}
            arrays = {name: _array_info(name, member, path) for name, member in _members(file, path)}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as exc:
        if isinstance(exc, CacheMismatch):
            raise
        raise damage_error(path, f"HDF5 says {exc}") from exc
    if not set(schema) - set(optional) <= set(arrays) <= set(schema):
        raise damage_error(path, f"it holds {sorted(arrays)}, expected {sorted(schema)}")
    for name, info in arrays.items():
        _check_array(info, *schema[name], file_bytes, path)
    return attrs, arrays


def _check_array(info: ArrayInfo, kinds: str, ndim: int, file_bytes: int, path: Path) -> None:
    """Check dtype and number of dimensions, and that all bytes that the shape needs are stored inside the file."""
    name, shape, dtype, offset, stored_bytes = info
    fits = dtype.kind == "S" if kinds == "S" else dtype.str[1:] in kinds.split("|")
    if not fits or len(shape) != ndim or dtype.str[0] == ">":
        raise damage_error(path, f"{name} is {dtype} {shape}, expected {kinds} in {ndim} dimensions")
    if stored_bytes != info.nbytes or offset < 0 or offset + stored_bytes > file_bytes:
        raise damage_error(path, f"{name} has the shape {shape}, but {stored_bytes} bytes are stored")


def _members(group: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    import h5py

    for name in group:
        if type(group.get(name, getlink=True)) is not h5py.HardLink:
            raise damage_error(path, f"{prefix}{name} is a soft or external link")
        member = group[name]
        if isinstance(member, h5py.Group) and not prefix:
            yield from _members(member, path, f"{name}/")
        elif isinstance(member, h5py.Dataset):
            yield f"{prefix}{name}", member
        else:
            raise damage_error(path, f"{prefix}{name} is not an array")


def _array_info(name: str, dataset: Any, path: Path) -> ArrayInfo:
    from h5py import h5d

    creation = dataset.id.get_create_plist()
    plain = creation.get_layout() == h5d.CONTIGUOUS and not creation.get_nfilters()
    if not plain or creation.get_external_count() or dataset.shape is None:
        raise damage_error(path, f"{name} is virtual, external, chunked, filtered or null")
    size = dataset.id.get_storage_size()
    offset = dataset.id.get_offset() if size else 0
    return ArrayInfo(name, dataset.shape, dataset.dtype, -1 if offset is None else offset, size)


def _attribute(file: Any, name: str, path: Path) -> int | str:
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iS":
        raise damage_error(path, f"the attribute {name} is {attribute.dtype} {attribute.shape}")
    value = file.attrs[name]
    return int(value) if attribute.dtype.kind == "i" else bytes(value).decode()


def damage_error(path: Path, reason: str) -> CacheMismatch:
    """Return the error for a file whose content is not what embedpipe wrote."""
    hint = "move the file away and run the same command again: its rows are computed again"
    return CacheMismatch(f"{path} is damaged or foreign: {reason}", hint=hint, path=str(path))

"""What an HDF5 file says of itself, read without following what leads out of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from embedpipe.errors import CacheMismatch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Schema = Mapping[str, tuple[str, int]]


class Large(NamedTuple):
    """Name, shape and dtype of the one array that is streamed, not built in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Extent(NamedTuple):
    """An array and where its bytes lie in the file."""

    described: Large
    offset: int
    size: int

    def read(self, mapped: Bytes) -> Any:
        raw = mapped[self.offset : self.offset + self.size].tobytes()
        return np.frombuffer(raw, self.described.dtype).reshape(self.described.shape)


def check_extent(extent: Extent, kind: str, ndim: int, file_size: int, path: Path) -> None:
    """Refuse an array of another type or rank, or one that says more than is stored."""
    (name, shape, dtype), offset, size = extent
    fits = dtype.kind == "S" if kind == "S" else dtype.str[1:] in kind.split("|")
    if not fits or len(shape) != ndim or dtype.str[0] == ">":
        raise damaged(path, f"{name} is {dtype} {shape}, expected {kind} in {ndim} dimensions")
    expected = dtype.itemsize
    for length in shape:
        expected *= length
    if size != expected or offset < 0 or offset + size > file_size:
        raise damaged(path, f"{name} says {shape}, but {size} bytes are stored")


def structure(stream: IO[bytes], path: Path) -> tuple[dict[str, Any], dict[str, Extent]]:
    """Return the attributes of a file and where its arrays lie, reading none of them.

    Raises
    ------
    CacheMismatch    not HDF5; soft or external links; virtual, external, chunked or filtered
                     arrays; odd attributes
    """
    import h5py

    try:
        with h5py.File(stream, "r") as file:
            attrs = {name: _attribute(file, name, path) for name in file.attrs}
            return attrs, {name: _extent(name, member, path) for name, member in _members(file, path)}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as exc:
        if isinstance(exc, CacheMismatch):
            raise
        raise damaged(path, f"HDF5 says {exc}") from exc


def _members(group: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    import h5py

    for name in group:
        if type(group.get(name, getlink=True)) is not h5py.HardLink:
            raise damaged(path, f"{prefix}{name} is a link out of its place")
        member = group[name]
        if isinstance(member, h5py.Group) and not prefix:
            yield from _members(member, path, f"{name}/")
        elif isinstance(member, h5py.Dataset):
            yield f"{prefix}{name}", member
        else:
            raise damaged(path, f"{prefix}{name} is no array")


def _extent(name: str, dataset: Any, path: Path) -> Extent:
    from h5py import h5d

    creation = dataset.id.get_create_plist()
    plain = creation.get_layout() == h5d.CONTIGUOUS and not creation.get_nfilters()
    if not plain or creation.get_external_count() or dataset.shape is None:
        raise damaged(path, f"{name} is virtual, external, chunked, filtered or null")
    size = dataset.id.get_storage_size()
    offset = dataset.id.get_offset() if size else 0
    return Extent(Large(name, dataset.shape, dataset.dtype), -1 if offset is None else offset, size)


def _attribute(file: Any, name: str, path: Path) -> int | str:
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iS":
        raise damaged(path, f"the attribute {name} is {attribute.dtype} {attribute.shape}")
    value = file.attrs[name]
    return int(value) if attribute.dtype.kind == "i" else bytes(value).decode()


def damaged(path: Path, found: str) -> CacheMismatch:
    """Return the error for a file that is not what was once written."""
    return CacheMismatch(
        f"{path} is damaged or foreign: {found}",
        hint="move the file away and run the same command again: its rows are computed anew",
        path=str(path),
    )

"""HDF5 files with a sealed header: plain HDF5 whose 512-byte user block holds a checksum.

A file has three parts:

user block    512 bytes of JSON before the HDF5 header: `format_version`, `data` = [offset, bytes] and `sha256`
header        the HDF5 structure and all small arrays
data          at most one large array, contiguous, at the end of the file

`sha256` covers the other fields of the user block and the header. It is checked whenever a file is opened, which reads
the header alone. The data are checked later: the header holds a sha256 of each MiB of them (see `_features`).

HDF5 builds the header in memory and never writes to the disk, so a full disk is an ordinary OSError.

The structure of a file is not trusted. Accepted are plain attributes and contiguous, unfiltered arrays inside the file. Links,
virtual, external, chunked or compressed arrays are errors, so a crafted file cannot make HDF5 open another file or
allocate more than it stores.

>>> stream.write(seal(build_header({"keys": keys}, {"rows": 3})))
>>> open_sealed(path, {"keys": ("u1", 2)}).arrays["keys"]
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedpipe.errors import CacheMismatch
from embedpipe.provenance import canonical_json
from embedpipe.storage import storage_errors

FORMAT_VERSION = 1
USER_BLOCK = 512
ALIGNMENT = 64

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

    def read(self, mapped: NDArray[np.uint8]) -> NDArray[Any]:
        """Return a copy of the array from the bytes of the file."""
        raw = mapped[self.offset : self.offset + self.stored_bytes].tobytes()
        return np.frombuffer(raw, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class SealedFile:
    """A file whose header has been checked.

    Attributes
    ----------
    attrs : dict of str to int or str
    arrays : dict of str to ndarray    copies of all arrays but the large one
    large : ArrayInfo or None
    offset : int                       where the data begin
    mapped : uint8 (file size,)        memory map of the whole file; its data are not checked yet
    """

    attrs: dict[str, Any]
    arrays: dict[str, Any]
    large: ArrayInfo | None
    offset: int
    mapped: NDArray[np.uint8]


class _HeaderStream(io.BytesIO):
    """The stream that HDF5 writes to; space for the large array is allocated but never written."""

    size = 0

    def truncate(self, size: int | None = None) -> int:
        self.size = self.tell() if size is None else size
        return self.size


def build_header(arrays: Mapping[str, Any], attrs: Mapping[str, int | str], large: ArrayInfo | None = None) -> bytes:
    """Return all bytes of a file before its data, with an empty user block; equal arguments give equal bytes."""
    import h5py

    stream, offset, size = _HeaderStream(), 0, 0
    with h5py.File(
        stream, "w", libver="earliest", userblock_size=USER_BLOCK, alignment_threshold=1, alignment_interval=ALIGNMENT
    ) as file:
        for name, value in attrs.items():
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
        for name in sorted(arrays):
            file.create_dataset(name, data=arrays[name])
        if large is not None:
            offset, size = _allocate(file, large)
    end = stream.size - size
    if size and offset != end:
        raise AssertionError(f"HDF5 put {large} at {offset}, not last at {end}")
    return stream.getvalue()[:end].ljust(end, b"\0")


def _allocate(file: Any, large: ArrayInfo) -> tuple[int, int]:
    """Allocate a contiguous array without writing it; return its offset and number of bytes."""
    from h5py import h5d, h5p

    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    dataset = file.create_dataset(large.name, large.shape, large.dtype, dcpl=creation).id
    return dataset.get_offset() or 0, dataset.get_storage_size()


def seal(header: bytes, data_bytes: int = 0) -> bytes:
    """Return the header with its user block filled in."""
    body = header[USER_BLOCK:]
    return _user_block(len(header), data_bytes, body) + body


def _user_block(offset: int, data_bytes: int, body: Any) -> bytes:
    fields = {"data": [offset, data_bytes], "format_version": FORMAT_VERSION}
    digest = hashlib.sha256(canonical_json(fields).encode())
    digest.update(body)
    block = canonical_json({**fields, "sha256": digest.hexdigest()})
    return block.encode().ljust(USER_BLOCK - 1) + b"\n"


def open_sealed(path: Path, schema: Schema, *, large: str | None = None, optional: Collection[str] = ()) -> SealedFile:
    """Open a file and check its header.

    Parameters
    ----------
    schema, optional : as in `_read_structure`
    large : str    name of the large array

    Raises
    ------
    FileNotFoundError    the file has been removed
    CacheMismatch        newer format, changed bytes, or a structure that is not allowed
    StorageError         the operating system refused
    """
    if path.is_symlink():
        raise damage_error(path, "it is a symbolic link")
    with storage_errors(path, "read", missing_ok=True), open(path, "rb", opener=_open_regular) as stream:
        mapped = _map(stream, path)
        offset, size = _check_seal(mapped, path)
        attrs, infos = _read_structure(stream, path, schema, file_bytes=mapped.size, optional=optional)
    arrays = {name: info.read(mapped) for name, info in infos.items() if name != large}
    data = infos[large] if large else None
    if data and (data.offset, data.stored_bytes) != (offset if size else 0, size):
        raise damage_error(path, "its user block and its structure disagree")
    return SealedFile(attrs, arrays, data, offset, mapped)


def _read_structure(
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


def map_again(path: Path, user_block: bytes) -> NDArray[np.uint8]:
    """Map a file that has been checked before; files never change, so an equal user block means the same file.

    Raises
    ------
    FileNotFoundError    the file has been removed or replaced
    """
    with storage_errors(path, "read", missing_ok=True), open(path, "rb", opener=_open_regular) as stream:
        mapped = _map(stream, path)
    if mapped[:USER_BLOCK].tobytes() != user_block:
        raise FileNotFoundError(path)
    return mapped


def _open_regular(path: str, flags: int) -> int:
    """Open a file, but no symbolic link, and without waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _map(stream: IO[bytes], path: Path) -> NDArray[np.uint8]:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size < USER_BLOCK:
        raise damage_error(path, "it is not a file of at least 512 bytes")
    return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _check_seal(mapped: NDArray[np.uint8], path: Path) -> tuple[int, int]:
    """Check user block and header; return offset and size of the data."""
    block = mapped[:USER_BLOCK].tobytes()
    try:
        fields = json.loads(block)
        version, (offset, size) = fields["format_version"], fields["data"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise damage_error(path, "its first 512 bytes are not a user block of embedpipe") from exc
    if any(type(number) is not int for number in (version, offset, size)) or offset + size != mapped.size:
        raise damage_error(path, "its first 512 bytes do not fit its size")
    check_version(version, path)
    if offset < USER_BLOCK or _user_block(offset, size, mapped[USER_BLOCK:offset]) != block:
        raise damage_error(path, "its bytes have changed")
    return offset, size


def check_version(version: int, path: Path) -> None:
    """Raise CacheMismatch if a newer version of embedpipe wrote the file."""
    if version > FORMAT_VERSION:
        message = f"{path} has format version {version}, this version of embedpipe reads up to {FORMAT_VERSION}"
        raise CacheMismatch(message, hint="update embedpipe, or choose another --cache-dir")


def damage_error(path: Path, reason: str) -> CacheMismatch:
    """Return the error for a file whose content is not what embedpipe wrote."""
    hint = "move the file away and run the same command again: its rows are computed again"
    return CacheMismatch(f"{path} is damaged or foreign: {reason}", hint=hint, path=str(path))

"""HDF5 files with a sealed header: plain HDF5 whose 512-byte user block holds a checksum.

A file has three parts:

user block    512 bytes of JSON before the HDF5 header: `format_version`, `data` = [offset, bytes] and `sha256`
header        the HDF5 structure and all small arrays
data          at most one large array, contiguous, at the end of the file

`sha256` covers the other fields of the user block and the header. It is checked whenever a file is opened, which reads
the header alone. The data are checked later: the header holds a sha256 of each MiB of them (see `_features`).

HDF5 builds the header in memory and never writes to the disk, so a full disk is an ordinary OSError.

>>> stream.write(seal(build_header({"keys": keys}, {"rows": 3})))
>>> open_sealed(path, {"keys": ("u1", 2)}).arrays["keys"]
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedpipe.cache._structure import ArrayInfo, Bytes, Schema, damage_error, read_structure
from embedpipe.errors import CacheMismatch
from embedpipe.provenance import canonical_json
from embedpipe.storage import storage_errors

FORMAT_VERSION = 1
USER_BLOCK = 512
ALIGNMENT = 64


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
    mapped: Bytes


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
    from h5py import h5d, h5p, h5s, h5t

    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    dtype, shape = h5t.py_create(large.dtype, logical=True), h5s.create_simple(large.shape)
    dataset = h5d.create(file.id, large.name.encode(), dtype, shape, creation)
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
    schema, optional : as in `read_structure`
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
        attrs, infos = read_structure(stream, path, schema, file_bytes=mapped.size, optional=optional)
    arrays = {name: info.read(mapped) for name, info in infos.items() if name != large}
    data = infos[large] if large else None
    if data and (data.offset, data.stored_bytes) != (offset if size else 0, size):
        raise damage_error(path, "its user block and its structure disagree")
    return SealedFile(attrs, arrays, data, offset, mapped)


def map_again(path: Path, user_block: bytes) -> Bytes:
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


def _map(stream: IO[bytes], path: Path) -> Bytes:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size < USER_BLOCK:
        raise damage_error(path, "it is not a file of at least 512 bytes")
    return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _check_seal(mapped: Bytes, path: Path) -> tuple[int, int]:
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
        raise CacheMismatch(
            f"{path} has format version {version}, this version of embedpipe reads up to {FORMAT_VERSION}",
            hint="update embedpipe, or choose another --cache-dir",
            found=version,
            expected=FORMAT_VERSION,
        )

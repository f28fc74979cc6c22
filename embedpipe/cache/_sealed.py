"""Sealed HDF5: a plain HDF5 file whose 512-byte user block proves every byte of it.

Layout: user block (JSON: format_version, data = [offset, bytes], sha256), head (all HDF5 structure and the small
arrays), data (at most one large array, contiguous, last in the file). `sha256` covers the other fields of the user
block and the head; the head holds a digest of each MiB of the data. So opening proves the head, at the price of the
head alone, and each MiB is proved when it is touched. The head is built in memory and HDF5 never writes to the disk: a
full disk is an ordinary OSError. Reading refuses whatever could make HDF5 look outside of the file.

>>> write_sealed(stream, {"keys": keys}, {"rows": 3})
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

from embedpipe.cache._structure import Bytes, Large, Schema, check_extent, damaged, structure
from embedpipe.errors import CacheMismatch
from embedpipe.provenance import canonical_json
from embedpipe.storage import storage_errors

FORMAT_VERSION = 1
USER_BLOCK = 512
ALIGNMENT = 64


@dataclass(frozen=True)
class Sealed:
    """A sealed file whose head has been proved.

    Attributes
    ----------
    attrs : dict of str to int or str
    arrays : dict of str to ndarray    all arrays but the large one, copied out of the file
    large : Large or None
    offset : int                       where the bytes of the large array begin
    mapped : uint8 (file size,)        the whole file, memory-mapped; its data is not yet proved
    """

    path: Path
    attrs: dict[str, Any]
    arrays: dict[str, Any]
    large: Large | None
    offset: int
    mapped: Bytes


class _Head(io.BytesIO):
    """What HDF5 writes to: the large array, last in the file, is allocated and never written."""

    size = 0

    def truncate(self, size: int | None = None) -> int:
        self.size = self.tell() if size is None else size
        return self.size


def build_head(arrays: Mapping[str, Any], attrs: Mapping[str, int | str], large: Large | None = None) -> bytes:
    """Return all bytes before the data of `large`, the user block empty; deterministic."""
    import h5py

    head, offset, size = _Head(), 0, 0
    with h5py.File(
        head, "w", libver="earliest", userblock_size=USER_BLOCK, alignment_threshold=1, alignment_interval=ALIGNMENT
    ) as file:
        for name, value in attrs.items():
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
        for name in sorted(arrays):
            file.create_dataset(name, data=arrays[name])
        if large is not None:
            offset, size = _allocate(file, large)
    end = head.size - size
    if size and offset != end:
        raise AssertionError(f"HDF5 put {large} at {offset}, not last at {end}")
    return head.getvalue()[:end].ljust(end, b"\0")


def _allocate(file: Any, large: Large) -> tuple[int, int]:
    from h5py import h5d, h5p, h5s, h5t

    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    dtype, shape = h5t.py_create(large.dtype, logical=True), h5s.create_simple(large.shape)
    dataset = h5d.create(file.id, large.name.encode(), dtype, shape, creation)
    return dataset.get_offset() or 0, dataset.get_storage_size()


def seal(head: bytes, data_bytes: int) -> bytes:
    """Return the head with its user block filled in."""
    body = head[USER_BLOCK:]
    return _user_block(len(head), data_bytes, memoryview(body)) + body


def _user_block(offset: int, data_bytes: int, body: Any) -> bytes:
    fields = {"data": [offset, data_bytes], "format_version": FORMAT_VERSION}
    digest = hashlib.sha256(canonical_json(fields).encode())
    digest.update(body)
    block = canonical_json({**fields, "sha256": digest.hexdigest()})
    return block.encode().ljust(USER_BLOCK - 1) + b"\n"


def write_sealed(stream: IO[bytes], arrays: Mapping[str, Any], attrs: Mapping[str, int | str]) -> None:
    """Write a sealed file that has no large array."""
    stream.write(seal(build_head(arrays, attrs), 0))


def open_sealed(path: Path, schema: Schema, *, large: str | None = None, optional: Collection[str] = ()) -> Sealed:
    """Open a sealed file and prove its head.

    Parameters
    ----------
    schema : mapping of array name to (NumPy's kind and size, such as "f4|f2", or "S"; dimensions)
    large : str        which of them is the large one
    optional : names    which of them may be absent

    Raises
    ------
    FileNotFoundError    it is gone
    CacheMismatch        newer format, other bytes than were written, HDF5 features not allowed
    StorageError         the operating system refused
    """
    if path.is_symlink():
        raise damaged(path, "it is a symbolic link")
    with storage_errors(path, "read", missing_ok=True), open(path, "rb", opener=_open_plain) as stream:
        mapped = _map(stream, path)
        offset, size = _prove(mapped, path)
        attrs, extents = structure(stream, path)
    if not set(schema) - set(optional) <= set(extents) <= set(schema):
        raise damaged(path, f"it holds {sorted(extents)}, expected {sorted(schema)}")
    for name, extent in extents.items():
        check_extent(extent, *schema[name], mapped.size, path)
    arrays = {name: extent.read(mapped) for name, extent in extents.items() if name != large}
    kept = extents[large].described if large else None
    if large and (extents[large].offset, extents[large].size) != (offset if size else 0, size):
        raise damaged(path, "its user block and its structure disagree")
    return Sealed(path, attrs, arrays, kept, offset, mapped)


def map_again(path: Path, block: bytes) -> Bytes:
    """Map a proved, immutable file once more; another file under its name counts as gone.

    Raises
    ------
    FileNotFoundError    it is gone
    """
    with storage_errors(path, "read", missing_ok=True), open(path, "rb", opener=_open_plain) as stream:
        mapped = _map(stream, path)
    if mapped[:USER_BLOCK].tobytes() != block:
        raise FileNotFoundError(path)
    return mapped


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _map(stream: IO[bytes], path: Path) -> Bytes:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size < USER_BLOCK:
        raise damaged(path, "it is not a file of at least 512 bytes")
    return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _prove(mapped: Bytes, path: Path) -> tuple[int, int]:
    block = mapped[:USER_BLOCK].tobytes()
    try:
        fields = json.loads(block)
        version, (offset, size) = fields["format_version"], fields["data"]
        numbers = (version, offset, size)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise damaged(path, "its first 512 bytes are not a seal") from exc
    if any(type(number) is not int for number in numbers) or offset + size != mapped.size:
        raise damaged(path, "its first 512 bytes do not fit its size")
    check_version(version, path)
    if offset < USER_BLOCK or _user_block(offset, size, mapped[USER_BLOCK:offset]) != block:
        raise damaged(path, "its bytes are not those that were written")
    return offset, size


def check_version(version: int, path: Path) -> None:
    """Refuse what a newer embedpipe wrote."""
    if version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{path} has format version {version}, this embedpipe reads up to {FORMAT_VERSION}",
            hint="update embedpipe, or name another --cache-dir",
            found=version,
            expected=FORMAT_VERSION,
        )

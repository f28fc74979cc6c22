"""Feature files: rows, keys, failures and checksums in one sealed HDF5 file. The base and the shards have the same schema.

A space is read without a lock, through a view: a snapshot of its files, checked as they are read. Files are immutable and
replaced by renames, so a view stays valid while others write. If a merge removes shards that the view has not opened yet, the
view opens the merged base instead.

Arrays
------
/features       (n, D) float32 or float16, the data of the sealed file
/keys           (n, 32) uint8, the sha256 of each image file
/blocks         (m, 32) uint8, the sha256 of each MiB of the features, then of each MiB of the keys
/failed/keys    (f, 32) uint8, images that could not be decoded, with /failed/stage, /failed/reason, /failed/decoder

The attributes are fingerprint, spec (JSON), rows and format_version. A reader memory-maps the features and compares a
block with its sha256 when it first reads a row in it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedpipe.cache._meta import FEATURES, Meta, list_shards, read_meta
from embedpipe.cache._sealed import (
    FORMAT_VERSION,
    USER_BLOCK,
    ArrayInfo,
    build_header,
    damage_error,
    map_again,
    open_sealed,
    seal,
)
from embedpipe.provenance import canonical_json, fingerprint

BLOCK = 1 << 20
KEY_BYTES = 32
CHUNK_BYTES = 32 << 20
MAX_OPEN_FILES = 64
FAILURE_FIELDS = ("failed/stage", "failed/reason", "failed/decoder")
SCHEMA = {
    "features": ("f4|f2", 2),
    "keys": ("u1", 2),
    "blocks": ("u1", 2),
    "failed/keys": ("u1", 2),
    **dict.fromkeys(FAILURE_FIELDS, ("S", 1)),
}

Array = np.ndarray[Any, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
FailureRecord = tuple[str, str, str]
TOMBSTONE: FailureRecord = ("", "", "")  # in a shard: the failure recorded before no longer holds


def key_matrix(keys: Iterable[bytes]) -> Bytes:
    """Return keys as uint8 (n, 32)."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def write_features(
    stream: IO[bytes], meta: Meta, keys: Bytes, chunks: Iterable[Array], failures: Mapping[bytes, FailureRecord]
) -> None:
    """Write a feature file to a stream, one chunk of rows in memory at a time.

    Parameters
    ----------
    meta : Meta    of the space: its spec, and width D and dtype of the rows
    keys : uint8 (n, 32)
    chunks : arrays (any, D), together (n, D)
    """
    large = ArrayInfo("features", (len(keys), meta.feature_dim), np.dtype(meta.dtype))
    n_blocks = _count_blocks(large.nbytes) + _count_blocks(keys.size)
    failed = sorted(failures)
    arrays = {"keys": keys, "blocks": np.zeros((n_blocks, 32), np.uint8), "failed/keys": key_matrix(failed)}
    arrays |= {name: encode_texts(failures[key][n] for key in failed) for n, name in enumerate(FAILURE_FIELDS)}
    attrs: dict[str, int | str] = {
        "fingerprint": fingerprint(meta.spec),
        "spec": canonical_json(meta.spec),
        "rows": len(keys),
        "format_version": FORMAT_VERSION,
    }
    stream.seek(len(build_header(arrays, attrs, large)))
    arrays["blocks"] = key_matrix([*_write_hashed(stream, chunks), *_block_digests(keys.tobytes())])
    stream.seek(0)
    stream.write(seal(build_header(arrays, attrs, large), large.nbytes))


def _write_hashed(stream: IO[bytes], chunks: Iterable[Array]) -> Iterator[bytes]:
    """Write chunks, and yield the sha256 of each MiB of them."""
    rest = b""
    for chunk in chunks:
        raw = chunk.tobytes()
        stream.write(raw)
        rest += raw
        whole = len(rest) - len(rest) % BLOCK
        yield from _block_digests(rest[:whole])
        rest = rest[whole:]
    yield from _block_digests(rest)


def _count_blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK)


def _block_digests(raw: Any) -> Iterator[bytes]:
    for start in range(0, len(raw), BLOCK):
        yield hashlib.sha256(raw[start : start + BLOCK]).digest()


def encode_texts(texts: Iterable[str]) -> Array:
    """Return texts as an array of fixed-length bytes; file names keep their bytes, whatever their encoding."""
    encoded = [os.fsencode(text).replace(b"\0", b" ") for text in texts]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=0) or 1}")


def decode_texts(column: Array) -> list[str]:
    """Invert `encode_texts`."""
    return [os.fsdecode(text) for text in column.tolist()]


class FeatureFile:
    """An immutable feature file; its header is checked when it is opened, each MiB of rows when it is first read.

    Attributes
    ----------
    keys : uint8 (n, 32)
    failures : dict of key to (stage, reason, decoder)
    shape, dtype : of the features
    """

    def __init__(self, path: Path, space: str) -> None:
        sealed = open_sealed(path, SCHEMA, large="features")
        if sealed.attrs.get("fingerprint") != space:
            raise damage_error(path, f"it belongs to the space {sealed.attrs.get('fingerprint')}")
        assert sealed.large is not None
        self.path, self.shape, self.dtype = path, sealed.large.shape, sealed.large.dtype
        self.keys: Bytes = sealed.arrays["keys"]
        self._blocks, self._offset = sealed.arrays["blocks"], sealed.offset
        row_blocks = _count_blocks(sealed.large.nbytes)
        consistent = self.keys.shape == (self.shape[0], KEY_BYTES) and len(self._blocks) >= row_blocks
        if not consistent or self._blocks.shape[1:] != (KEY_BYTES,):
            raise damage_error(path, "its keys, rows and block digests do not fit together")
        stages, reasons, decoders = (decode_texts(sealed.arrays[name]) for name in FAILURE_FIELDS)
        failed = [key.tobytes() for key in sealed.arrays["failed/keys"]]
        if not len(failed) == len(stages) == len(reasons) == len(decoders):
            raise damage_error(path, "its failures do not fit together")
        self.failures = dict(zip(failed, zip(stages, reasons, decoders, strict=True), strict=True))
        self._checked = np.zeros(row_blocks, bool)
        self._mapped: Bytes | None = sealed.mapped
        self._user_block = sealed.mapped[:USER_BLOCK].tobytes()

    def release(self) -> None:
        """Close the memory map; the next read opens the file again."""
        self._mapped = None

    def rows(self, index: Array) -> Array:
        """Return features (len(index), D) of the rows `index`, as a view of the file where the rows are consecutive.

        Raises
        ------
        FileNotFoundError    the file has been removed
        CacheMismatch        the stored bytes have changed
        """
        if self._mapped is None:
            self._mapped = map_again(self.path, self._user_block)
        data = self._mapped[self._offset :]
        self._check_blocks(data, index)
        features = data.view(self.dtype).reshape(self.shape)
        consecutive = len(index) > 0 and bool((np.diff(index) == 1).all())
        return np.asarray(features[index[0] : index[-1] + 1] if consecutive else features[index])

    def _check_blocks(self, data: Bytes, index: Array) -> None:
        """Compare the blocks that hold rows with their digests, unless that has been done before."""
        row_bytes = self.shape[1] * self.dtype.itemsize
        touched = np.zeros(len(self._checked) + 1, np.int64)
        np.add.at(touched, index * row_bytes // BLOCK, 1)
        np.add.at(touched, ((index + 1) * row_bytes - 1) // BLOCK + 1, -1)
        for block in np.flatnonzero((np.cumsum(touched)[:-1] > 0) & ~self._checked).tolist():
            raw = data[block * BLOCK : (block + 1) * BLOCK].tobytes()
            if hashlib.sha256(raw).digest() != self._blocks[block].tobytes():
                raise damage_error(self.path, f"MiB {block} of its features has changed")
            self._checked[block] = True

    def find_damage(self, meta: Meta) -> Iterator[str]:
        """Read the whole file again; yield each changed MiB, changed keys, rows with NaN or infinity, and another width."""
        if (self.shape[1], self.dtype.name) != (meta.feature_dim, meta.dtype):
            yield f"it has {self.shape[1]} x {self.dtype} a row, expected {meta.feature_dim} x {meta.dtype}"
        data = map_again(self.path, self._user_block)[self._offset :]
        expected = [block.tobytes() for block in self._blocks]
        changed = [n for n, digest in enumerate(_block_digests(data)) if digest != expected[n]]
        yield from (f"MiB {number} of its features has changed" for number in changed)
        if list(_block_digests(self.keys.tobytes())) != expected[len(self._checked) :]:
            yield "its keys have changed"
        if changed:
            return
        step = max(1, BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            rows = self.rows(np.arange(start, min(start + step, self.shape[0])))
            for row in np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
                yield f"row {start + row} has NaN or infinity"


class _KeyTable:
    """File and row of each key; of duplicate keys the row of the base or of the oldest shard counts."""

    def __init__(self, files: list[FeatureFile]) -> None:
        self.files = files
        every = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(file.keys for file in files)])
        self.keys, first = np.unique(_sortable(every), return_index=True)
        counts = [len(file.keys) for file in files]
        self.owner = np.repeat(np.arange(len(files)), counts)[first]
        self.row = first - np.cumsum([0, *counts])[self.owner]

    def find(self, keys: Array) -> tuple[Array, Array]:
        """Return file number and row of each key.

        Raises
        ------
        KeyError    a key has no row
        """
        position = np.searchsorted(self.keys, keys)
        found = np.zeros(len(keys), bool)
        inside = position < len(self.keys)
        found[inside] = self.keys[position[inside]] == keys[inside]
        if not found.all():
            raise KeyError(keys[~found][:1].tobytes().hex())
        return self.owner[position], self.row[position]


class SpaceView:
    """A snapshot of a space; its rows stay readable while others write and merge.

    Parameters
    ----------
    folder : Path           of the space
    fingerprint : str       of the space
    max_open_files : int    how many files stay memory-mapped; each takes a file descriptor

    Attributes
    ----------
    keys : uint8 (n, 32)    sorted
    failures : dict of key to (stage, reason, decoder)    of keys without a row
    paths : the files that were read, the base first

    Raises
    ------
    CacheMismatch    a file is damaged or of a newer format
    """

    def __init__(self, folder: Path, fingerprint: str, max_open_files: int = MAX_OPEN_FILES) -> None:
        self._folder, self._fingerprint, self._max_open_files = folder, fingerprint, max_open_files
        self._table = table = self._open_files()
        self.keys: Bytes = np.ascontiguousarray(table.keys).view(np.uint8).reshape(-1, KEY_BYTES)
        self.paths = [file.path for file in table.files]
        meta = read_meta(folder, fingerprint)
        self.feature_dim = meta.feature_dim if meta else 0
        self.dtype = np.dtype(meta.dtype if meta else "float32")
        latest: dict[bytes, FailureRecord] = {}
        for file in table.files:
            if (file.shape[1], file.dtype) != (self.feature_dim, self.dtype):
                raise damage_error(file.path, f"it has {file.shape[1]} x {file.dtype} a row")
            latest.update(file.failures)
        self.failures = {key: failure for key, failure in latest.items() if failure != TOMBSTONE and key not in self}

    def __reduce__(self) -> tuple[Any, ...]:
        return SpaceView, (self._folder, self._fingerprint, self._max_open_files)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._members

    @cached_property
    def _members(self) -> frozenset[bytes]:
        return frozenset(self.keys.view(f"V{KEY_BYTES}").reshape(-1).tolist())

    def read(self, keys: Iterable[bytes]) -> Array:
        """Return the rows of `keys`, in their order, (n, D) of the stored dtype.

        Raises
        ------
        KeyError         a key has no row
        CacheMismatch    the stored bytes have changed
        """
        requested = _sortable(key_matrix(keys))
        while True:
            with suppress(FileNotFoundError):
                return self._read(requested)
            self._table = self._open_files()  # the shards have been merged meanwhile

    def read_chunks(self, keys: Sequence[bytes] | Bytes, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
        """Yield the rows of `keys`, in their order, in chunks of at most `chunk_bytes` or one row."""
        step = max(1, chunk_bytes // max(1, self.feature_dim * self.dtype.itemsize))
        for start in range(0, len(keys), step):
            yield self.read(keys[start : start + step])

    def _read(self, keys: Array) -> Array:
        files = self._table.files
        owner, row = self._table.find(keys)
        features = np.empty((len(keys), self.feature_dim), self.dtype)
        for number in np.unique(owner).tolist():
            positions = np.flatnonzero(owner == number)
            features[positions] = files[number].rows(row[positions])
            if number >= self._max_open_files:
                files[number].release()
        return features

    def _open_files(self) -> _KeyTable:
        """Open the shards, then the base; start again if a shard was merged meanwhile."""
        while True:
            with suppress(FileNotFoundError):
                shards = []
                for path in list_shards(self._folder):
                    shards.append(FeatureFile(path, self._fingerprint))
                    if len(shards) >= self._max_open_files:
                        shards[-1].release()
                base = []
                with suppress(FileNotFoundError):
                    base.append(FeatureFile(self._folder / FEATURES, self._fingerprint))
                return _KeyTable([*base, *shards])


def _sortable(keys: Bytes) -> Array:
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)

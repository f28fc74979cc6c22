"""Feature files: rows, keys, failures and checksums in one sealed HDF5 file. The base and the shards have the same schema.

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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedpipe.cache._meta import Meta
from embedpipe.cache._sealed import FORMAT_VERSION, ArrayInfo, build_header, damage_error, map_again, open_sealed, seal
from embedpipe.provenance import canonical_json, fingerprint

BLOCK = 1 << 20
KEY_BYTES = 32
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
    arrays = {"keys": keys, "blocks": np.zeros((n_blocks, 32), np.uint8), **_failure_arrays(failures)}
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


def _failure_arrays(failures: Mapping[bytes, FailureRecord]) -> dict[str, Array]:
    keys = sorted(failures)
    columns = {name: encode_texts(failures[key][n] for key in keys) for n, name in enumerate(FAILURE_FIELDS)}
    return {"failed/keys": key_matrix(keys), **columns}


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
        self.failures = _failures_of(sealed.arrays, path)
        self._checked = np.zeros(row_blocks, bool)
        self._mapped: Bytes | None = sealed.mapped
        self._user_block = sealed.user_block

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


def _failures_of(arrays: Mapping[str, Array], path: Path) -> dict[bytes, FailureRecord]:
    stages, reasons, decoders = (decode_texts(arrays[name]) for name in FAILURE_FIELDS)
    keys = [key.tobytes() for key in arrays["failed/keys"]]
    try:
        return dict(zip(keys, zip(stages, reasons, decoders, strict=True), strict=True))
    except ValueError as exc:
        raise damage_error(path, "its failures do not fit together") from exc

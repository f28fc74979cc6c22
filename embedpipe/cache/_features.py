"""One feature file: rows, keys, failures, and a digest of each MiB; base and shards are the same.

Arrays: /features (n, D) float32|float16, /keys (n, 32) uint8, /blocks (m, 32) uint8 = sha256 of
each MiB of features, then of keys; /failed/keys, /failed/stage, /failed/reason, /failed/decoder.
Attributes: fingerprint, spec (JSON), rows, format_version.

Where rows are packed, /features (bytes, 1) uint8 is one after the other, /ends (n,) int64 is where each
ends, and the attributes feature_dim and dtype say what they are when unpacked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedpipe.cache._packing import Array, unpack
from embedpipe.cache._sealed import FORMAT_VERSION, USER_BLOCK, Sealed, build_head, map_again, open_sealed, seal
from embedpipe.cache._structure import Bytes, Large, damaged
from embedpipe.provenance import canonical_json, fingerprint

BLOCK = 1 << 20
KEY_BYTES = 32
SCHEMA = {
    "features": ("f4|f2|u1", 2),
    "ends": ("i8", 1),
    "keys": ("u1", 2),
    "blocks": ("u1", 2),
    "failed/keys": ("u1", 2),
    "failed/stage": ("S", 1),
    "failed/reason": ("S", 1),
    "failed/decoder": ("S", 1),
}

FailureRecord = tuple[str, str, str]
FORGOTTEN: FailureRecord = ("", "", "")


def key_matrix(keys: Iterable[bytes]) -> Bytes:
    """Return keys as uint8 (n, 32)."""
    joined = b"".join(keys)
    return np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES)


def write_features(
    stream: IO[bytes],
    spec: Mapping[str, Any],
    keys: Bytes,
    chunks: Iterable[Array],
    *,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    failures: Mapping[bytes, FailureRecord],
    packed: Array | None = None,
) -> None:
    """Stream a feature file; memory holds the keys and one chunk.

    Parameters
    ----------
    keys : uint8 (n, 32)
    chunks : arrays of `dtype`, (n, D) when put together; or packed rows, uint8, one after the other
    packed : int64 (n,)    bytes of each packed row
    """
    size = shape[0] * shape[1] * dtype.itemsize if packed is None else int(packed.sum())
    blocks = np.zeros((-(-size // BLOCK) + -(-keys.size // BLOCK), 32), np.uint8)
    arrays = {"keys": keys, "blocks": blocks, **_failed_arrays(failures)}
    attrs: dict[str, int | str] = {
        "fingerprint": fingerprint(spec),
        "spec": canonical_json(spec),
        "rows": shape[0],
        "format_version": FORMAT_VERSION,
    }
    large = Large("features", shape, dtype)
    if packed is not None:
        large = Large("features", (size, 1), np.dtype(np.uint8))
        arrays["ends"] = np.cumsum(packed, dtype=np.int64)
        attrs |= {"feature_dim": shape[1], "dtype": dtype.name}
    stream.seek(len(build_head(arrays, attrs, large)))
    digests = [*_write_digested(stream, chunks), *_digests(keys.tobytes())]
    arrays["blocks"] = key_matrix(digests)
    stream.seek(0)
    stream.write(seal(build_head(arrays, attrs, large), size))


def _write_digested(stream: IO[bytes], chunks: Iterable[Array]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        raw = chunk.tobytes()
        stream.write(raw)
        rest += raw
        whole = len(rest) - len(rest) % BLOCK
        yield from _digests(rest[:whole])
        rest = rest[whole:]
    yield from _digests(rest)


def _digests(raw: Any) -> Iterator[bytes]:
    for start in range(0, len(raw), BLOCK):
        yield hashlib.sha256(raw[start : start + BLOCK]).digest()


def _failed_arrays(failures: Mapping[bytes, FailureRecord]) -> dict[str, Array]:
    keys = sorted(failures)
    columns = zip(*(failures[key] for key in keys), strict=True) if keys else ((), (), ())
    named = zip(("failed/stage", "failed/reason", "failed/decoder"), columns, strict=True)
    return {"failed/keys": key_matrix(keys), **{name: text_column(texts) for name, texts in named}}


def text_column(texts: Iterable[str]) -> Array:
    """Return texts as fixed-length bytes, as wide as the longest; file names keep their bytes."""
    encoded = [os.fsencode(text).replace(b"\0", b" ") for text in texts]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=0) or 1}")


def texts_of(column: Array) -> list[str]:
    """Undo `text_column`."""
    return [os.fsdecode(text) for text in column.tolist()]


class FeatureFile:
    """An immutable feature file, its head proved; each MiB of rows is proved when first touched.

    Attributes
    ----------
    keys : uint8 (n, 32)
    failures : dict of key to (stage, reason, decoder)
    shape, dtype : of the features
    packed : bool
    """

    def __init__(self, path: Path, space: str) -> None:
        sealed = open_sealed(path, SCHEMA, large="features", optional=("ends",))
        if sealed.attrs.get("fingerprint") != space:
            raise damaged(path, f"it belongs to the space {sealed.attrs.get('fingerprint')}")
        self.path, self._seal = path, sealed.mapped[:USER_BLOCK].tobytes()
        self.keys: Bytes = sealed.arrays["keys"]
        self.packed, self._ends = "ends" in sealed.arrays, sealed.arrays.get("ends")
        self.shape, self.dtype = _described(sealed)
        self._blocks, self._offset = sealed.arrays["blocks"], sealed.offset
        row_blocks = -(-(sealed.mapped.size - sealed.offset) // BLOCK)
        consistent = self.keys.shape == (self.shape[0], KEY_BYTES) and len(self._blocks) >= row_blocks
        if not consistent or sealed.arrays["blocks"].shape[1:] != (KEY_BYTES,):
            raise damaged(path, "its keys, rows and block digests do not fit together")
        self.failures = _failures_of(sealed.arrays, path)
        self._proved = np.zeros(row_blocks, bool)
        self._mapped: Bytes | None = sealed.mapped

    def release(self) -> None:
        """Give the memory map back; the next read opens the file again."""
        self._mapped = None

    def rows(self, index: Array) -> Array:
        """Return features (len(index), D) of the rows `index`; of neighbours in order no copy.

        Raises
        ------
        FileNotFoundError    the file has gone meanwhile
        CacheMismatch        the stored bytes have changed
        """
        if self.packed:
            return self._unpacked(self.stored(index))
        every = self._proved_data(index).view(self.dtype).reshape(self.shape)
        together = len(index) > 0 and bool((np.diff(index) == 1).all())
        return np.asarray(every[index[0] : index[-1] + 1] if together else every[index])

    def stored(self, index: Array) -> list[Bytes]:
        """Return rows as they are stored, packed ones packed; it raises what `rows` does."""
        data, spans = self._proved_data(index), zip(*self._spans(index), strict=True)
        return [data[start:end] for start, end in spans]

    def sizes(self, index: Array) -> Array:
        """Return the bytes that rows take, int64 (len(index),)."""
        starts, ends = self._spans(index)
        return ends - starts

    def _spans(self, index: Array) -> tuple[Array, Array]:
        """Return where the bytes of rows begin and end."""
        if self._ends is None:
            size = self.shape[1] * self.dtype.itemsize
            return index * size, (index + 1) * size
        return np.where(index > 0, self._ends[index - 1], 0), self._ends[index]

    def _unpacked(self, stored: Sequence[Bytes]) -> Array:
        features = np.empty((len(stored), self.shape[1]), self.dtype)
        try:
            for row, packed in zip(features, stored, strict=True):
                row[:] = unpack(packed, self.dtype, self.shape[1])
        except ValueError as exc:
            raise damaged(self.path, f"a packed row cannot be read: {exc}") from exc
        return features

    def flaws(self) -> Iterator[str]:
        """Look at every byte and every value; yield what is wrong: changed MiB, changed keys, NaN and infinity."""
        data = map_again(self.path, self._seal)[self._offset :]
        wanted = [block.tobytes() for block in self._blocks]
        rotten = [n for n, digest in enumerate(_digests(data)) if digest != wanted[n]]
        yield from (f"MiB {number} of its features has changed" for number in rotten)
        if list(_digests(self.keys.tobytes())) != wanted[len(self._proved) :]:
            yield "its keys are not those that were written"
        if rotten:
            return
        step = max(1, BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            rows = self.rows(np.arange(start, min(start + step, self.shape[0])))
            for row in np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
                yield f"row {start + row} has NaN or infinity"

    def _proved_data(self, index: Array) -> Bytes:
        """Return the bytes of all rows, those of `index` proved."""
        if self._mapped is None:
            self._mapped = map_again(self.path, self._seal)
        data, (starts, ends) = self._mapped[self._offset :], self._spans(index)
        touched = np.zeros(len(self._proved) + 1, np.int64)
        np.add.at(touched, starts // BLOCK, 1)
        np.add.at(touched, (ends - 1) // BLOCK + 1, -1)
        for block in np.flatnonzero((np.cumsum(touched)[:-1] > 0) & ~self._proved).tolist():
            raw = data[block * BLOCK : (block + 1) * BLOCK].tobytes()
            if hashlib.sha256(raw).digest() != self._blocks[block].tobytes():
                raise damaged(self.path, f"MiB {block} of its features has changed")
            self._proved[block] = True
        return data


def _described(sealed: Sealed) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the features, as they are when unpacked."""
    large, path = sealed.large, sealed.path
    assert large is not None
    if "ends" not in sealed.arrays:
        if large.dtype.kind != "f":
            raise damaged(path, f"its features are {large.dtype} and not packed")
        return large.shape, large.dtype
    ends, dtype, dim = sealed.arrays["ends"], sealed.attrs.get("dtype"), sealed.attrs.get("feature_dim")
    rising = bool((np.diff(ends, prepend=0) > 0).all()) and large.shape == (int(ends[-1]) if len(ends) else 0, 1)
    if dtype not in ("float16", "float32") or not isinstance(dim, int) or large.dtype.kind != "u" or not rising:
        raise damaged(path, "its packed rows do not fit together")
    return (len(ends), dim), np.dtype(dtype)


def _failures_of(arrays: Mapping[str, Array], path: Path) -> dict[bytes, FailureRecord]:
    columns = [texts_of(arrays[f"failed/{name}"]) for name in ("stage", "reason", "decoder")]
    keys = [key.tobytes() for key in arrays["failed/keys"]]
    if any(len(column) != len(keys) for column in columns):
        raise damaged(path, "its failures do not fit together")
    return dict(zip(keys, zip(*columns, strict=True), strict=True))

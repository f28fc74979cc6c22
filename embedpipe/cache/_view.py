"""Reading a space without a lock: a snapshot of its files, checked as they are read.

Files are immutable and replaced by renames, so a view stays valid while others write. If a merge removes shards that
the view has not opened yet, the view opens the merged base instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embedpipe.cache._features import KEY_BYTES, TOMBSTONE, Array, Bytes, FailureRecord, FeatureFile, key_matrix
from embedpipe.cache._meta import FEATURES, list_shards, read_meta
from embedpipe.cache._sealed import damage_error

CHUNK_BYTES = 32 << 20
MAX_OPEN_FILES = 64


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

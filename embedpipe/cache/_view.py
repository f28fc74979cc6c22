"""Reading a space: a snapshot of its files, without a lock, proved as it is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from embedpipe.cache._features import FORGOTTEN, KEY_BYTES, FailureRecord, FeatureFile, key_matrix
from embedpipe.cache._packing import Array
from embedpipe.cache._space import Space
from embedpipe.cache._structure import Bytes, damaged

CHUNK_BYTES = 32 << 20  # of rows held at a time where a whole space is streamed
KEPT_OPEN = 64  # memory maps of shards that a view holds on to; each one costs a file descriptor


class _Table:
    """Which file and row holds each key; the base goes first, later duplicates are dropped."""

    def __init__(self, files: list[FeatureFile]) -> None:
        self.files = files
        every = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(f.keys for f in files)])
        self.keys, first = np.unique(_sortable(every), return_index=True)
        counts = [len(file.keys) for file in files]
        starts = np.cumsum([0, *counts])[:-1]
        self.owner = np.repeat(np.arange(len(files)), counts)[first]
        self.row = first - (starts[self.owner] if files else 0)

    def find(self, wanted: Array) -> tuple[Array, Array]:
        """Return positions of keys, and whether each is there."""
        position = np.searchsorted(self.keys, wanted)
        inside = position < len(self.keys)
        found = inside.copy()
        found[inside] = self.keys[position[inside]] == wanted[inside]
        return position, found


class SpaceView:
    """A snapshot of a space; its rows stay readable through later writing and merging.

    Attributes
    ----------
    keys : uint8 (n, 32)    sorted
    failures : dict of key to (stage, reason, decoder), of keys without a row
    paths : the files it was read from, base first
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._table = table = _Table(_open_files(space))
        self.keys: Bytes = np.ascontiguousarray(table.keys).view(np.uint8).reshape(-1, KEY_BYTES)
        self.paths = [file.path for file in table.files]
        meta = space.meta
        self.feature_dim = meta.feature_dim if meta else 0
        self.dtype = np.dtype(meta.dtype if meta else "float32")
        for file in table.files:
            if (file.shape[1], file.dtype) != (self.feature_dim, self.dtype):
                raise damaged(file.path, f"it has {file.shape[1]} x {file.dtype} a row")
        self.failures = self._failures()

    def __reduce__(self) -> tuple[Any, ...]:
        return SpaceView, (self._space,)

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
        KeyError         a key without a row
        CacheMismatch    the stored bytes have changed
        """
        wanted = _sortable(key_matrix(keys))
        features = np.empty((len(wanted), self.feature_dim), self.dtype)
        self._visit(wanted, lambda file, mine, row: features.__setitem__(mine, file.rows(row)))
        return features

    def stored(self, keys: Iterable[bytes]) -> list[Bytes]:
        """Return rows as they are stored, in the order of `keys`; it raises what `read` does."""
        wanted = _sortable(key_matrix(keys))
        found: list[Any] = [None] * len(wanted)

        def take(file: FeatureFile, mine: Array, row: Array) -> None:
            for place, stored in zip(mine.tolist(), file.stored(row), strict=True):
                found[place] = stored

        self._visit(wanted, take)
        return found

    @property
    def sizes(self) -> Array:
        """The bytes that each row takes, int64 (n,), in the order of `keys`."""
        sizes = np.empty(len(self), np.int64)
        self._visit(self._table.keys, lambda file, mine, row: sizes.__setitem__(mine, file.sizes(row)))
        return sizes

    def _visit(self, wanted: Array, take: Callable[[FeatureFile, Array, Array], None]) -> None:
        """Call `take` with each file that has wanted rows, the places of these in `wanted`, and their numbers in the file."""
        while True:
            with suppress(FileNotFoundError):
                return self._visit_once(wanted, take)
            self._table = _Table(_open_files(self._space))  # merged meanwhile

    def _visit_once(self, wanted: Array, take: Callable[[FeatureFile, Array, Array], None]) -> None:
        table = self._table
        position, found = table.find(wanted)
        if not found.all():
            raise KeyError(wanted[~found][:1].tobytes().hex())
        owner, row = table.owner[position], table.row[position]
        for number in np.unique(owner).tolist():
            mine, file = np.flatnonzero(owner == number), table.files[number]
            take(file, mine, row[mine])
            if number >= KEPT_OPEN:
                file.release()

    def _failures(self) -> dict[bytes, FailureRecord]:
        latest: dict[bytes, FailureRecord] = {}
        for file in self._table.files:
            latest.update(file.failures)
        return {key: record for key, record in latest.items() if record != FORGOTTEN and key not in self}


def _open_files(space: Space) -> list[FeatureFile]:
    """Open shards first, the base second; begin again when a shard has been merged meanwhile."""
    while True:
        with suppress(FileNotFoundError):
            shards = []
            for path in space.shard_paths():
                shards.append(FeatureFile(path, space.fingerprint))
                if len(shards) >= KEPT_OPEN:
                    shards[-1].release()
            return [*_open_base(space), *shards]


def _open_base(space: Space) -> list[FeatureFile]:
    try:
        return [FeatureFile(space.features_path, space.fingerprint)]
    except FileNotFoundError:
        return []


def _sortable(keys: Bytes) -> Array:
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)

"""Writing a space: shards that are committed one by one, and merged into one sorted file at the end.

Commit protocol
---------------
1. Rows and failures collect in memory.
2. A shard of them is written to a temporary file, fsynced, renamed to `<number>-<uuid>.h5`, and the folder is fsynced.
   Only then are the rows committed: they survive a kill and a power cut. A file under its final name is complete.
3. `finish` merges the base and all shards into a new features.h5 in the same way, and removes the shards afterwards. A
   process killed between these two steps leaves duplicates, which readers and the next merge drop.

One process at a time writes a space (`_lock`). On file systems where locks do not work, writers only add shards: they
neither merge nor remove temporary files, since another writer may still need them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np

from embedpipe.cache._features import TOMBSTONE, Array, FailureRecord, key_matrix, write_features
from embedpipe.cache._lock import WriterLock
from embedpipe.cache._meta import FEATURES, LOCK, SHARDS, Meta, list_shards, read_meta, write_meta
from embedpipe.cache._view import CHUNK_BYTES, SpaceView
from embedpipe.errors import CacheMismatch, NonFiniteFeatures
from embedpipe.provenance import fingerprint
from embedpipe.storage import make_folder, publish, storage_errors, sweep, sync_path

MERGED_BELOW_BYTES = 1 << 30
MERGED_SHARE = 0.05


class SpaceWriter:
    """Holds the lock of a space during the `with` block; pending rows are committed however the block ends.

    An unfinished extraction leaves its pins in meta.json. They replace those of `requested` until `finish`.

    Parameters
    ----------
    requested : Meta          spec, width and dtype of the rows, and the environment and pins of this extraction
    shard_rows : int          pending rows and failures that make a commit due
    commit_seconds : float    age of the oldest pending row that makes a commit due

    Raises
    ------
    CacheBusy        on entering: another process writes to this space
    StorageError     disk full, no permission or an input/output error; what has been committed stays
    CacheMismatch    on entering: the space has rows of another width or dtype

    >>> with space.writer(feature_dim=512, dtype="float32", environment={}, pins={}) as writer:
    ...     writer.append(keys, features)
    ...     writer.finish()
    """

    def __init__(self, folder: Path, requested: Meta, *, shard_rows: int, commit_seconds: float) -> None:
        self._folder, self._meta = folder, requested
        self._shard_rows, self._commit_seconds = shard_rows, commit_seconds
        self._rows: list[tuple[Sequence[bytes], Array]] = []
        self._failures: dict[bytes, FailureRecord] = {}
        self._pending_since: float | None = None

    def __enter__(self) -> Self:
        make_folder(self._folder)
        self._lock = WriterLock(self._folder / LOCK)
        try:
            make_folder(self._folder / SHARDS)
            self._recover()
            self._meta = self._merge_meta(self._meta, read_meta(self._folder, fingerprint(self._meta.spec)))
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.commit()
        finally:
            self._lock.close()

    @property
    def pins(self) -> dict[str, Any]:
        """The pins in force."""
        return dict(self._meta.pins or {})

    def append(self, keys: Sequence[bytes], features: Array) -> None:
        """Add rows; commit if that is due.

        Parameters
        ----------
        keys : n keys of 32 bytes
        features : float (n, D)

        Raises
        ------
        NonFiniteFeatures    NaN or infinity in the stored dtype: no row of this call is added; the attributes `rows` and
                             `keys` name all such rows
        """
        features = np.asarray(features)
        if features.shape != (len(keys), self._meta.feature_dim):
            expected = (len(keys), self._meta.feature_dim)
            raise ValueError(f"features are {features.shape}, expected {expected}")
        with np.errstate(over="ignore"):
            stored = np.array(features, dtype=f"<{np.dtype(self._meta.dtype).str[1:]}", order="C")
        _check_finite(keys, features, stored)
        self._rows.append((list(keys), stored))
        self._commit_if_due()

    def fail(self, key: bytes, stage: str, reason: str, decoder: str) -> None:
        """Record an image that cannot be decoded, with the version of the decoder; commit if that is due."""
        self._failures[key] = (stage, reason, decoder)
        self._commit_if_due()

    def forget_failures(self, keys: Iterable[bytes]) -> None:
        """Remove recorded failures, so that these images are tried again; commit if that is due."""
        self._failures.update(dict.fromkeys(keys, TOMBSTONE))
        self._commit_if_due()

    def commit(self) -> None:
        """Write pending rows and failures as one shard."""
        if not self._rows and not self._failures:
            return
        keys = key_matrix(chain.from_iterable(keys for keys, _ in self._rows))
        numbers = [int(path.name.partition("-")[0]) for path in list_shards(self._folder)]
        name = f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex}.h5"
        self._write_file(self._folder / SHARDS / name, keys, [features for _, features in self._rows], self._failures)
        self._rows, self._failures, self._pending_since = [], {}, None

    def finish(self, *, merge_below_bytes: int = MERGED_BELOW_BYTES, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Commit, merge the shards if that is due, and clear the pins.

        Parameters
        ----------
        merge_below_bytes : int    a smaller space is always merged; a larger one when its shards exceed 5 % of the base
        chunk_bytes : int          rows held in memory during a merge
        """
        self.commit()
        view = SpaceView(self._folder, fingerprint(self._meta.spec))
        base = self._folder / FEATURES
        shards = [path for path in view.paths if path != base]
        if self._lock.exclusive and shards and self._merge_is_due(base, merge_below_bytes):
            self._write_file(base, view.keys, view.read_chunks(view.keys, chunk_bytes), view.failures)
            with storage_errors(self._folder / SHARDS, "remove merged files from"):
                for path in shards:
                    path.unlink(missing_ok=True)
        self._meta = replace(self._meta, pins=None)
        write_meta(self._folder, self._meta)

    def _recover(self) -> None:
        """Make renames of killed writers durable; remove their temporary files if the lock excludes other writers."""
        shards = self._folder / SHARDS
        with storage_errors(shards, "sync"):
            sync_path(shards)
        if self._lock.exclusive:
            sweep(self._folder)
            sweep(shards)

    def _merge_meta(self, requested: Meta, stored: Meta | None) -> Meta:
        """Return the stored metadata with the new environment, and with the new pins if none are in force; write it."""
        merged = requested
        if stored is not None:
            if (stored.feature_dim, stored.dtype) != (requested.feature_dim, requested.dtype):
                raise CacheMismatch(
                    f"{self._folder} holds {stored.feature_dim} x {stored.dtype} a row, "
                    f"expected {requested.feature_dim} x {requested.dtype}",
                    hint="choose another --cache-dir, and report this: equal specs give equal shapes",
                )
            new = [record for record in requested.environments if record not in stored.environments]
            pins = requested.pins if stored.pins is None else stored.pins
            merged = replace(stored, environments=(*stored.environments, *new), pins=pins)
        if merged != stored:
            write_meta(self._folder, merged)
        return merged

    def _commit_if_due(self) -> None:
        now, pending = time.monotonic(), sum(len(keys) for keys, _ in self._rows) + len(self._failures)
        self._pending_since = self._pending_since or now
        if pending >= self._shard_rows or now - self._pending_since >= self._commit_seconds:
            self.commit()

    def _merge_is_due(self, base: Path, merge_below_bytes: int) -> bool:
        with storage_errors(self._folder, "measure"):
            base_bytes = base.stat().st_size if base.exists() else 0
            shard_bytes = sum(path.stat().st_size for path in list_shards(self._folder))
        return base_bytes + shard_bytes < merge_below_bytes or shard_bytes > MERGED_SHARE * base_bytes

    def _write_file(self, path: Path, *content: Any) -> None:
        """Write a feature file atomically; `content` are the last arguments of `write_features`."""
        publish(path, lambda stream: write_features(stream, self._meta, *content))


def _check_finite(keys: Sequence[bytes], features: Array, stored: Array) -> None:
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1)).tolist()
    if not bad:
        return
    overflow = bool(np.isfinite(features[bad]).all())
    raise NonFiniteFeatures(
        f"row {bad[0]} of {len(stored)} " + (f"is too large for {stored.dtype}" if overflow else "has NaN or infinity"),
        hint="store float32 (--store-dtype float32)" if overflow else "try --precision fp32",
        rows=bad,
        keys=[keys[row] for row in bad],
    )

"""A space: all features with one fingerprint, in one folder, and its writer.

A writer commits shards one by one, and merges them into one sorted file at the end.

Commit protocol
---------------
1. Rows and failures collect in memory.
2. A shard of them is written to a temporary file, fsynced, renamed to `<number>-<uuid>.h5`, and the folder is fsynced.
   Only then are the rows committed: they survive a kill and a power cut. A file under its final name is complete.
3. `finish` merges the base and all shards into a new features.h5 in the same way, and removes the shards afterwards. A
   process killed between these two steps leaves duplicates, which readers and the next merge drop.

One process at a time writes a space. On file systems where locks do not work, writers only add shards: they
neither merge nor remove temporary files, since another writer may still need them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedpipe.cache._features import CHUNK_BYTES, MAX_OPEN_FILES, TOMBSTONE, SpaceView, key_matrix, write_features
from embedpipe.cache._meta import FEATURES, SHARDS, Meta, WriterLock, list_shards, mark_used, read_meta, write_meta
from embedpipe.errors import CacheMismatch, NonFiniteFeatures, StorageError
from embedpipe.provenance import fingerprint
from embedpipe.storage import make_folder, storage_errors, sweep, sync_path, write_atomic

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
        self._rows: list[tuple[Sequence[bytes], NDArray[Any]]] = []
        self._failures: dict[bytes, tuple[str, str, str]] = {}
        self._pending_since: float | None = None

    def __enter__(self) -> Self:
        make_folder(self._folder)
        self._lock = WriterLock(self._folder)
        try:
            make_folder(self._folder / SHARDS)
            self._recover()
            self._merge_meta()
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

    def append(self, keys: Sequence[bytes], features: NDArray[Any]) -> None:
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
        expected = (len(keys), self._meta.feature_dim)
        if features.shape != expected:
            raise ValueError(f"features are {features.shape}, expected {expected}")
        with np.errstate(over="ignore"):
            stored = np.array(features, dtype=f"<{np.dtype(self._meta.dtype).str[1:]}", order="C")
        _check_finite(features, stored)
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
        path = self._folder / SHARDS / f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex}.h5"
        chunks, failures = [features for _, features in self._rows], self._failures
        write_atomic(path, lambda stream: write_features(stream, self._meta, keys, chunks, failures))
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
            chunks = view.read_chunks(view.keys, chunk_bytes)
            write_atomic(base, lambda stream: write_features(stream, self._meta, view.keys, chunks, view.failures))
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

    def _merge_meta(self) -> None:
        """Add the new environment to the stored metadata, and the new pins if none are in force."""
        requested, stored = self._meta, read_meta(self._folder, fingerprint(self._meta.spec))
        if stored is not None:
            if (stored.feature_dim, stored.dtype) != (requested.feature_dim, requested.dtype):
                got, expected = (f"{meta.feature_dim} x {meta.dtype}" for meta in (stored, requested))
                hint = "choose another --cache-dir, and report this: equal specs give equal shapes"
                raise CacheMismatch(f"{self._folder} holds {got} a row, expected {expected}", hint=hint)
            new = [record for record in requested.environments if record not in stored.environments]
            pins = requested.pins if stored.pins is None else stored.pins
            self._meta = replace(stored, environments=(*stored.environments, *new), pins=pins)
        if self._meta != stored:
            write_meta(self._folder, self._meta)

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


def _check_finite(features: NDArray[Any], stored: NDArray[Any]) -> None:
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1)).tolist()
    if not bad:
        return
    overflow = bool(np.isfinite(features[bad]).all())
    reason = f"is too large for {stored.dtype}" if overflow else "has NaN or infinity"
    hint = "store float32 (--store-dtype float32)" if overflow else "try --precision fp32"
    raise NonFiniteFeatures(f"row {bad[0]} of {len(stored)} {reason}", hint=hint, rows=bad)


@dataclass(frozen=True)
class Space:
    """All features with one fingerprint: a base file, and the shards that are not merged into it yet.

    Parameters
    ----------
    folder : Path    .../spaces/<name>-<fingerprint12>; the first writer creates it
    spec : dict      JSON values: everything that determines a feature
    """

    folder: Path
    spec: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """The sha256 of the spec, 64 hex digits."""
        return fingerprint(self.spec)

    @property
    def unsupported(self) -> str | None:
        """Why this version of embedpipe cannot read the space, None if it can."""
        return "packed (compressed) rows are no longer supported" if "packed" in self.spec else None

    @property
    def meta(self) -> Meta | None:
        """The present content of meta.json, None before the first writer."""
        return read_meta(self.folder, self.fingerprint)

    @property
    def feature_dim(self) -> int | None:
        """D, None before the first writer."""
        return meta.feature_dim if (meta := self.meta) else None

    @property
    def environments(self) -> tuple[dict[str, Any], ...]:
        """The records of libraries and device that computed rows, oldest first."""
        return meta.environments if (meta := self.meta) else ()

    @property
    def loader(self) -> dict[str, Any]:
        """The arguments of `load_backbone` that gave the backbone; empty if the user passed a backbone object."""
        environments = self.environments
        return dict(environments[-1].get("loader", {})) if environments else {}

    @property
    def interrupted(self) -> bool:
        """Whether an extraction has begun and not finished, so that its pins are in force."""
        return (meta := self.meta) is not None and meta.pins is not None

    @property
    def features_path(self) -> Path:
        """The base file; absent before the first merge."""
        return self.folder / FEATURES

    def shard_paths(self) -> list[Path]:
        """Return the committed shards, oldest first."""
        return list_shards(self.folder)

    @property
    def pending_shards(self) -> int:
        """The number of shards that are not merged yet."""
        return len(self.shard_paths())

    def mark_used(self) -> None:
        """Record that the space has been written or read, as the time of meta.json; do nothing in a read-only cache."""
        mark_used(self.folder)

    def view(self, *, max_open_files: int = MAX_OPEN_FILES) -> SpaceView:
        """Return a snapshot to read from; see `SpaceView`.

        Raises
        ------
        CacheMismatch    a file is damaged or of a newer format, or the space is not supported
        """
        self._check_supported()
        return SpaceView(self.folder, self.fingerprint, max_open_files)

    def ensure_free(self) -> None:
        """Check that a writer can begin now.

        Raises
        ------
        CacheBusy    another process writes to this space
        """
        with suppress(StorageError):  # no folder yet, or an error that the writer itself will raise
            WriterLock(self.folder).close()

    def discard_pending(self) -> None:
        """Remove the shards that are not merged yet, and the pins of the unfinished extraction that wrote them.

        Raises
        ------
        CacheBusy        another process writes to this space
        CacheMismatch    the file system has no locks, so that another process may be writing
        """
        with closing(WriterLock(self.folder)) as lock:
            if not lock.exclusive:
                raise CacheMismatch(
                    f"{self.folder.name} has rows of an interrupted extraction that cannot be continued, "
                    "and the file system has no locks, so they cannot be removed safely",
                    hint=f"`embedpipe cache rm {self.folder.name}`, and run the same command again",
                )
            with storage_errors(self.folder, "remove unfinished rows from"):
                for path in self.shard_paths():
                    path.unlink(missing_ok=True)
            if meta := self.meta:
                write_meta(self.folder, replace(meta, pins=None))

    def writer(
        self,
        *,
        feature_dim: int,
        dtype: Any,
        environment: Mapping[str, Any],
        pins: Mapping[str, Any],
        shard_rows: int = 1024,
        commit_seconds: float = 30,
    ) -> SpaceWriter:
        """Return the writer, a context manager; see `SpaceWriter`."""
        self._check_supported()
        requested = Meta(
            name=self.folder.name.rpartition("-")[0],
            spec=dict(self.spec),
            feature_dim=feature_dim,
            dtype=np.dtype(dtype).name,
            environments=(dict(environment),),
            pins=dict(pins),
        )
        return SpaceWriter(self.folder, requested, shard_rows=shard_rows, commit_seconds=commit_seconds)

    def _check_supported(self) -> None:
        if self.unsupported:
            hint = f"remove it with `embedpipe cache rm {self.folder.name}`; its rows are computed again where needed"
            raise CacheMismatch(f"{self.folder} cannot be read: {self.unsupported}", hint=hint)

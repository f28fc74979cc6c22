"""The one writer of a space: shards published whole, and merged into one sorted file at the end.

Rows of a space whose spec says `packed` are packed as they come.

>>> with space.writer(feature_dim=512, dtype="float32", environment={}, pins={}) as writer:
...     writer.append(keys, features)
...     writer.finish()
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from embedpipe.cache._features import FORGOTTEN, FailureRecord, key_matrix, write_features
from embedpipe.cache._lock import WriterLock
from embedpipe.cache._meta import Meta, write_meta
from embedpipe.cache._packing import Array, pack
from embedpipe.cache._space import Space
from embedpipe.cache._structure import Bytes
from embedpipe.cache._view import CHUNK_BYTES, SpaceView
from embedpipe.errors import CacheMismatch, NonFiniteFeatures
from embedpipe.storage import make_folder, publish, storage_errors, sweep, sync_path

ALWAYS_MERGED_BYTES = 1 << 30
MERGED_SHARE = 0.05


class SpaceWriter:
    """Holds the lock for the whole `with` block; what is pending is committed on any way out.

    A row is committed, and survives a kill and a power cut, when `commit` has returned. An
    interrupted extraction left its pins in meta.json: they win over those given, until `finish`.

    Raises
    ------
    CacheBusy        on entering: somebody else writes to this space
    StorageError     disk full, permission, input/output; what was committed before stays
    CacheMismatch    on entering: the space has rows of another width or dtype
    """

    def __init__(self, space: Space, wanted: Meta, *, shard_rows: int, commit_seconds: float) -> None:
        self._space, self._meta = space, wanted
        self._shard_rows, self._commit_seconds = shard_rows, commit_seconds
        self._packed = "packed" in space.spec
        self._rows: list[tuple[Sequence[bytes], Sequence[Array]]] = []
        self._failures: dict[bytes, FailureRecord] = {}
        self._since = time.monotonic()
        self._held = ExitStack()

    def __enter__(self) -> Self:
        space = self._space
        make_folder(space.folder)
        self._lock = WriterLock(space.folder / ".lock")
        with ExitStack() as held:
            held.callback(self._lock.release)
            make_folder(space.shards_folder)
            self._recover()
            self._meta = self._agree(self._meta, space.meta)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            self.commit()

    @property
    def pins(self) -> dict[str, Any]:
        """The pins in force."""
        return dict(self._meta.pins or {})

    def append(self, keys: Sequence[bytes], features: Array) -> None:
        """Take rows; commits when enough are pending or the oldest has waited long enough.

        Parameters
        ----------
        keys : n keys of 32 bytes
        features : float (n, D)

        Raises
        ------
        NonFiniteFeatures    NaN or infinity in the stored dtype: none of this call is taken; `rows`
                             and `keys` name all such rows
        """
        features = np.asarray(features)
        if features.shape != (len(keys), self._meta.feature_dim):
            expected = (len(keys), self._meta.feature_dim)
            raise ValueError(f"features are {features.shape}, expected {expected}")
        with np.errstate(over="ignore"):
            stored = np.array(features, dtype=f"<{np.dtype(self._meta.dtype).str[1:]}", order="C")
        _check_finite(keys, features, stored)
        self._touch()
        self._rows.append((list(keys), [pack(row) for row in stored] if self._packed else [stored]))
        self._commit_when_due()

    def fail(self, key: bytes, stage: str, reason: str, decoder: str) -> None:
        """Record an image that its decoder refuses, with the decoder's version."""
        self._touch()
        self._failures[key] = (stage, reason, decoder)
        self._commit_when_due()

    def forget_failures(self, keys: Iterable[bytes]) -> None:
        """Take recorded failures back, so that these images are tried again."""
        self._touch()
        self._failures.update(dict.fromkeys(keys, FORGOTTEN))

    def commit(self) -> None:
        """Publish what is pending as one shard."""
        if not self._rows and not self._failures:
            return
        keys = key_matrix(chain.from_iterable(keys for keys, _ in self._rows))
        chunks = list(chain.from_iterable(chunks for _, chunks in self._rows))
        sizes = np.array([chunk.nbytes for chunk in chunks], np.int64) if self._packed else None
        name = f"{self._next_number():08d}-{uuid.uuid4().hex}.h5"
        self._write(self._space.shards_folder / name, keys, chunks, self._failures, sizes)
        self._rows, self._failures = [], {}

    def finish(self) -> None:
        """Commit, merge the shards where that is due, and end the pins."""
        self.commit()
        view = self._space.view()
        shards = [path for path in view.paths if path != self._space.features_path]
        if self._lock.proved and shards and self._merge_is_due():
            sizes = view.sizes if self._packed else None
            self._write(self._space.features_path, view.keys, _chunks(view, sizes), view.failures, sizes)
            with storage_errors(self._space.shards_folder, "remove merged files from"):
                for path in shards:
                    path.unlink(missing_ok=True)
        self._meta = replace(self._meta, pins=None)
        write_meta(self._space.folder, self._meta)

    def _recover(self) -> None:
        """Make durable what killed writers named; sweep what they left if the lock excludes."""
        folder, shards = self._space.folder, self._space.shards_folder
        with storage_errors(shards, "sync"):
            sync_path(shards)
        if self._lock.proved:
            sweep(folder)
            sweep(shards)

    def _agree(self, wanted: Meta, stored: Meta | None) -> Meta:
        if stored is None:
            agreed = wanted
        elif (stored.feature_dim, stored.dtype) != (wanted.feature_dim, wanted.dtype):
            raise CacheMismatch(
                f"{self._space.folder} holds {stored.feature_dim} x {stored.dtype} a row, "
                f"expected {wanted.feature_dim} x {wanted.dtype}",
                hint="name another --cache-dir, and report this: equal specs give equal shapes",
            )
        else:
            news = [one for one in wanted.environments if one not in stored.environments]
            environments = (*stored.environments, *news)
            pins = wanted.pins if stored.pins is None else stored.pins
            agreed = replace(stored, environments=environments, pins=pins)
        if agreed != stored:
            write_meta(self._space.folder, agreed)
        return agreed

    def _touch(self) -> None:
        if not self._rows and not self._failures:
            self._since = time.monotonic()

    def _commit_when_due(self) -> None:
        rows = sum(len(keys) for keys, _ in self._rows) + len(self._failures)
        if rows >= self._shard_rows or time.monotonic() - self._since >= self._commit_seconds:
            self.commit()

    def _next_number(self) -> int:
        numbers = [int(path.name.partition("-")[0]) for path in self._space.shard_paths()]
        return max(numbers, default=0) + 1

    def _merge_is_due(self) -> bool:
        base = self._space.features_path
        with storage_errors(self._space.folder, "measure"):
            base_bytes = base.stat().st_size if base.exists() else 0
            shard_bytes = sum(path.stat().st_size for path in self._space.shard_paths())
        small = base_bytes + shard_bytes < ALWAYS_MERGED_BYTES
        return small or shard_bytes > MERGED_SHARE * base_bytes

    def _write(
        self,
        path: Path,
        keys: Bytes,
        chunks: Iterable[Array],
        failed: Mapping[bytes, FailureRecord],
        packed: Array | None,
    ) -> None:
        shape, dtype = (len(keys), self._meta.feature_dim), np.dtype(self._meta.dtype)

        def write(stream: IO[bytes]) -> None:
            spec = self._space.spec
            write_features(stream, spec, keys, chunks, shape=shape, dtype=dtype, failures=failed, packed=packed)

        publish(path, write)


def _chunks(view: SpaceView, packed: Array | None) -> Iterator[Array]:
    step = max(1, CHUNK_BYTES // (view.feature_dim * view.dtype.itemsize))
    for start in range(0, len(view), step):
        keys = [key.tobytes() for key in view.keys[start : start + step]]
        yield from (view.read(keys),) if packed is None else view.stored(keys)


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

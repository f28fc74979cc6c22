"""A space: all features with one fingerprint, in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedpipe.cache._lock import WriterLock
from embedpipe.cache._meta import FEATURES, LOCK, Meta, list_shards, mark_used, read_meta, write_meta
from embedpipe.cache._view import MAX_OPEN_FILES, SpaceView
from embedpipe.cache._writer import SpaceWriter
from embedpipe.errors import CacheMismatch, StorageError
from embedpipe.provenance import fingerprint
from embedpipe.storage import storage_errors


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
        meta = self.meta
        return meta.feature_dim if meta else None

    @property
    def environments(self) -> tuple[dict[str, Any], ...]:
        """The records of libraries and device that computed rows, oldest first."""
        meta = self.meta
        return meta.environments if meta else ()

    @property
    def loader(self) -> dict[str, Any]:
        """The arguments of `load_backbone` that gave the backbone; empty if the user passed a backbone object."""
        environments = self.environments
        return dict(environments[-1].get("loader", {})) if environments else {}

    @property
    def interrupted(self) -> bool:
        """Whether an extraction has begun and not finished, so that its pins are in force."""
        meta = self.meta
        return meta is not None and meta.pins is not None

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
            WriterLock(self.folder / LOCK).close()

    def discard_pending(self) -> None:
        """Remove the shards that are not merged yet, and the pins of the unfinished extraction that wrote them.

        Raises
        ------
        CacheBusy        another process writes to this space
        CacheMismatch    the file system has no locks, so that another process may be writing
        """
        with closing(WriterLock(self.folder / LOCK)) as lock:
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

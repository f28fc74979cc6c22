"""A space: one base file and the shards not yet merged into it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache._caring import mark_used
from embedpipe.cache._meta import Meta, read_meta, write_meta
from embedpipe.cache._structure import damaged
from embedpipe.errors import CacheMismatch, StorageError
from embedpipe.provenance import fingerprint
from embedpipe.storage import storage_errors

if TYPE_CHECKING:
    from embedpipe.cache._view import SpaceView
    from embedpipe.cache._writer import SpaceWriter

SHARD = re.compile(r"\d{8,}-[0-9a-f]{32}\.h5")


@dataclass(frozen=True)
class Space:
    """All features with one fingerprint.

    Parameters
    ----------
    folder : Path    .../spaces/<name>-<fingerprint12>; made by the first writer
    spec : dict      JSON-able; everything that shapes a feature
    """

    folder: Path
    spec: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The readable prefix of the folder."""
        return self.folder.name.rpartition("-")[0]

    @property
    def fingerprint(self) -> str:
        """sha256 of the spec, 64 hex digits."""
        return fingerprint(self.spec)

    @property
    def meta(self) -> Meta | None:
        """What meta.json says now; None before the first writer."""
        meta = read_meta(self.folder)
        if meta is not None and fingerprint(meta.spec) != self.fingerprint:
            raise damaged(self.folder, "its spec is that of another space")
        return meta

    @property
    def feature_dim(self) -> int | None:
        """D, or None before the first writer."""
        meta = self.meta
        return meta.feature_dim if meta else None

    @property
    def dtype(self) -> str | None:
        """ "float32" or "float16", or None before the first writer."""
        meta = self.meta
        return meta.dtype if meta else None

    @property
    def environments(self) -> tuple[dict[str, Any], ...]:
        """The records of libraries and device that added rows, oldest first."""
        meta = self.meta
        return meta.environments if meta else ()

    @property
    def loader(self) -> dict[str, Any]:
        """Keyword arguments of `load_backbone` that made the rows; empty for a backbone handed over as an object."""
        environments = self.environments
        return dict(environments[-1].get("loader", {})) if environments else {}

    @property
    def interrupted(self) -> bool:
        """Whether an extraction began and has not finished: its pins are in force."""
        meta = self.meta
        return meta is not None and meta.pins is not None

    @property
    def features_path(self) -> Path:
        """The base file; absent before the first merge."""
        return self.folder / "features.h5"

    @property
    def shards_folder(self) -> Path:
        """Where the rows are that were committed after the last merge."""
        return self.folder / "shards"

    def shard_paths(self) -> list[Path]:
        """Return the committed shards, oldest first."""
        with storage_errors(self.shards_folder, "list"):
            names = [name for name in _listed(self.shards_folder) if SHARD.fullmatch(name)]
        return [self.shards_folder / name for name in sorted(names)]

    @property
    def pending_shards(self) -> int:
        """How many shards wait for a merge."""
        return len(self.shard_paths())

    def mark_used(self) -> None:
        """Record that the space was filled or read: the time of meta.json; a cache that only reads forgets it."""
        mark_used(self.folder)

    def view(self) -> SpaceView:
        """Return a snapshot to read from."""
        from embedpipe.cache._view import SpaceView

        return SpaceView(self)

    def ensure_free(self) -> None:
        """Do nothing where a writer could begin now.

        Raises
        ------
        CacheBusy    somebody else writes to this space
        """
        from embedpipe.cache._lock import WriterLock

        with suppress(StorageError):  # no folder yet, or one that the writer itself will complain of
            WriterLock(self.folder / ".lock").release()

    def discard_pending(self) -> None:
        """Remove the shards that are not merged yet, and the pins of the interrupted extraction that wrote them.

        Raises
        ------
        CacheBusy        somebody else writes to this space
        CacheMismatch    the file system has no locks, so that another process may be writing
        """
        from embedpipe.cache._lock import WriterLock

        lock = WriterLock(self.folder / ".lock")
        try:
            if not lock.proved:
                raise CacheMismatch(
                    f"{self.folder.name} has rows of an interrupted extraction that cannot be continued, "
                    "and the file system has no locks, so they cannot be removed safely",
                    hint=f"`embedpipe cache rm {self.folder.name}`, and run the same command again",
                )
            with storage_errors(self.shards_folder, "remove unfinished rows from"):
                for path in self.shard_paths():
                    path.unlink(missing_ok=True)
            if meta := self.meta:
                write_meta(self.folder, replace(meta, pins=None))
        finally:
            lock.release()

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
        """Return the one writer, to be entered with `with`; see `SpaceWriter`."""
        from embedpipe.cache._writer import SpaceWriter

        wanted = Meta(
            name=self.name,
            spec=dict(self.spec),
            feature_dim=feature_dim,
            dtype=np.dtype(dtype).name,
            environments=(dict(environment),),
            pins=dict(pins),
        )
        return SpaceWriter(self, wanted, shard_rows=shard_rows, commit_seconds=commit_seconds)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []

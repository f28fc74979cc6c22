"""What a space costs, when it was used last, and how it goes: work on its folder, whatever is in it."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from embedpipe.cache._lock import WriterLock
from embedpipe.cache._meta import FILE
from embedpipe.errors import StorageError
from embedpipe.storage import TEMPORARY, storage_errors, sync_path

LEFTOVER_S = 3600.0  # a younger temporary file may be one that is being written


def mark_used(folder: Path) -> None:
    """Give meta.json the present time: the record of the last use, best effort."""
    with suppress(OSError):
        os.utime(folder / FILE)


def last_used(folder: Path) -> float:
    """Return when a space was filled or read last, Unix time, s."""
    path = folder / FILE
    return (path if path.exists() else folder).stat().st_mtime


def measure(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; what goes meanwhile counts nothing."""
    below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for one in below if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            total += os.lstat(one).st_size
    return total


def remove_space(folder: Path, *, dry_run: bool) -> None:
    """Take a space out of sight in one rename, then off the disk, holding its writer's lock all the while."""
    lock = WriterLock(folder / ".lock")
    try:
        if not lock.proved:
            raise StorageError(
                f"locks on {folder} exclude nobody, a writer may be at work",
                hint="remove the folder by hand when nobody writes to it",
            )
        if dry_run:
            return
        with storage_errors(folder, "remove"):
            hidden = folder.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            folder.rename(hidden)
            sync_path(folder.parent)
            shutil.rmtree(hidden)
    finally:
        lock.release()


def sweep_leftovers(root: Path, *, dry_run: bool) -> dict[str, int]:
    """Remove what killed processes left in a cache under temporary names an hour ago or longer; return names and bytes."""
    swept = {}
    for folder in (root, root / "spaces", root / "datasets", root / "graphs"):
        for path in sorted(folder.glob(f"{TEMPORARY}*")):
            with storage_errors(path, "remove"), suppress(FileNotFoundError):
                if path.lstat().st_mtime > time.time() - LEFTOVER_S:
                    continue
                swept[path.name] = measure(path)
                if not dry_run:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return swept

"""Size, last use and removal of spaces, whatever their content."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from embedpipe.cache._lock import WriterLock
from embedpipe.cache._meta import FILE, LOCK
from embedpipe.errors import StorageError
from embedpipe.storage import TEMPORARY, storage_errors, sync_path

LEFTOVER_S = 3600.0  # a younger temporary file may still be in use


def mark_used(folder: Path) -> None:
    """Set the time of meta.json, which records the last use, to now; a read-only cache is left as it is."""
    with suppress(OSError):
        os.utime(folder / FILE)


def last_used(folder: Path) -> float:
    """Return when a space was last written or read, Unix time in seconds."""
    path = folder / FILE
    return (path if path.exists() else folder).stat().st_mtime


def measure(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; files that vanish meanwhile count as empty."""
    below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in below if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            total += os.lstat(file).st_size
    return total


def remove_folder(folder: Path, *, dry_run: bool) -> None:
    """Remove a space under its writer lock: rename the folder to a temporary name, then delete it."""
    lock = WriterLock(folder / LOCK)
    try:
        if not lock.exclusive:
            raise StorageError(
                f"locks on {folder} exclude nobody, another process may be writing",
                hint="remove the folder by hand when nothing writes to it",
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
    """Remove temporary files and folders that are older than an hour; return their names and bytes."""
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

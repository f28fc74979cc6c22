"""Durable writes: files and folders that appear complete or not at all, even after a kill or a power cut.

>>> publish(Path("runs/notes.txt"), b"complete or absent")
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from embedpipe.errors import EmbedpipeError, StorageError, UsageError

PathLike = str | os.PathLike[str]

TEMPORARY = ".tmp-"
RETRY = "free some space or check the permissions, then run the same command again"
UNSYNCABLE = (errno.EACCES, errno.EPERM, errno.EINVAL)  # errors of folders that this process cannot have created
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@contextmanager
def storage_errors(path: Path | str, action: str, *, missing_ok: bool = False, hint: str = RETRY) -> Iterator[None]:
    """Turn an OSError into a StorageError; with `missing_ok`, re-raise FileNotFoundError unchanged."""
    try:
        yield
    except OSError as exc:
        if isinstance(exc, EmbedpipeError) or (missing_ok and isinstance(exc, FileNotFoundError)):
            raise
        raise StorageError(f"could not {action} {path}: {exc.strerror or exc}", hint=hint) from exc


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and fsync each parent before anything is written into the new folder.

    The parent of an existing folder is synced too: the process that created the folder may have been killed before.

    Raises
    ------
    StorageError    no permission, or a file has the name of the folder
    """
    with storage_errors(folder, "make the folder"):
        if not folder.is_dir():
            make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
        try:
            sync_path(folder.parent)
        except OSError as exc:
            if exc.errno not in UNSYNCABLE:
                raise


def sync_path(path: Path) -> None:
    """Fsync a file, or a folder so that the renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: write a temporary file, fsync it, rename it, fsync the folder.

    A file under its final name is always complete.

    Parameters
    ----------
    content : bytes, or a function that writes them to a binary stream

    Raises
    ------
    StorageError    disk full, no permission or an input/output error; the temporary file is removed
    """
    make_folder(path.parent)
    with storage_errors(path, "write"):
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content) if isinstance(content, bytes) else content(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.rename(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_path(path.parent)


@contextmanager
def atomic_folder(final: Path, *, hidden: Path | None = None, what: str = "folder") -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `final` if the block succeeds, remove it if the block raises.

    Parameters
    ----------
    hidden : Path    name of the temporary folder, emptied first; default: a new name next to `final`
    what : str       what the folder is called in error messages

    Raises
    ------
    StorageError    disk full, no permission or an input/output error
    """
    folder = hidden or final.with_name(f"{TEMPORARY}{os.urandom(3).hex()}-{final.name}")
    make_folder(final.parent)
    with storage_errors(final, f"write the {what}"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            for path in (*folder.rglob("*"), folder):
                sync_path(path)
            folder.rename(final)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync_path(final.parent)


def sweep(folder: Path) -> None:
    """Remove temporary files of killed writers; call it only while holding a verified lock."""
    with storage_errors(folder, "sweep"):
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of a folder, which need not exist yet, has enough free space.

    Raises
    ------
    StorageError    fewer than `needed_bytes` are free; the message gives both numbers
    """
    folder = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    with storage_errors(folder, "read the free space of"):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        message = f"{format_size(free_bytes)} are free in {folder}, {format_size(needed_bytes)} are needed"
        raise StorageError(message, hint="free some space, or choose another folder with --cache-dir")


def format_size(count: int) -> str:
    """Format a number of bytes, such as "1.5 MB"."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"


def parse_amount(text: str | float, units: Mapping[str, int], flag: str, example: str) -> float:
    """Parse a number with an optional unit, such as "10GB" with the units of `BYTES`.

    Raises
    ------
    UsageError    `text` has another form
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in units:
        raise UsageError(f"{flag}: got {text!r}, expected a number and a unit such as {example}")
    return float(match[1]) * units[match[2].upper()]

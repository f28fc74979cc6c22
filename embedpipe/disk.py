"""Folders and files that survive a kill and a power cut. Any room may enter.

>>> publish(Path("runs/notes.txt"), b"whole or not at all")
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from embedpipe.errors import EmbedpipeError, StorageError, UsageError

PathLike = str | os.PathLike[str]

TEMPORARY = ".tmp-"
FOREIGN = (errno.EACCES, errno.EPERM, errno.EINVAL)  # a folder that cannot be read or synced holds none that we made
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@contextmanager
def storage_errors(path: Path, doing: str, *, missing_ok: bool = False) -> Iterator[None]:
    """Turn an OSError into a StorageError; with `missing_ok`, FileNotFoundError passes."""
    try:
        yield
    except OSError as exc:
        passes = isinstance(exc, FileNotFoundError) and missing_ok
        if passes or isinstance(exc, EmbedpipeError):
            raise
        raise StorageError(
            f"could not {doing} {path}: {exc.strerror or exc}",
            hint="free some space or check the permissions, then run the same command again",
            path=str(path),
        ) from exc


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each one durable before anything is put into it.

    A folder that is there is made durable too: whoever made it may have been killed before doing so.

    Raises
    ------
    StorageError    no permission, or a file stands in the way
    """
    with storage_errors(folder, "make the folder"):
        if not folder.is_dir():
            make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
        try:
            sync_folder(folder.parent)
        except OSError as exc:
            if exc.errno not in FOREIGN:
                raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole: temporary name, its content, fsync, rename, fsync of the folder.

    The final name is the only mark of being done.

    Parameters
    ----------
    content : bytes, or a function that writes them to a stream

    Raises
    ------
    StorageError    disk full, permission, input/output; no trace of the attempt is left
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
        sync_folder(path.parent)


@contextmanager
def whole_folder(final: Path, *, hidden: Path | None = None, what: str = "folder") -> Iterator[Path]:
    """Give a folder to fill; it appears as `final` when the block ends well, and not at all otherwise.

    Parameters
    ----------
    hidden : Path    where it is filled; what a killed process left there goes. Default: a new name
    what : str       to call it by in an error

    Raises
    ------
    StorageError    disk full, permission, input/output
    """
    folder = hidden or final.with_name(f"{TEMPORARY}{secrets.token_hex(3)}-{final.name}")
    make_folder(final.parent)
    with storage_errors(final, f"write the {what}"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            _sync_tree(folder)
            folder.rename(final)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync_folder(final.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    for path in [*folder.rglob("*/"), folder]:
        sync_folder(path)


def sweep(folder: Path) -> None:
    """Remove what killed writers left; only for the holder of a proved lock."""
    with storage_errors(folder, "sweep"):
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a plan that the disk cannot hold.

    Raises
    ------
    StorageError    less than `needed_bytes` are free; both figures are in the message
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    with storage_errors(folder, "read the free space of"):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{show_size(free_bytes)} are free in {folder}, {show_size(needed_bytes)} are needed",
            hint="free some space, or name another place with --cache-dir",
            free_bytes=free_bytes,
            needed_bytes=needed_bytes,
        )


def show_size(count: int) -> str:
    """Return bytes as a text."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"


def parse_amount(text: str | float, units: Mapping[str, int], flag: str, example: str) -> float:
    """Return what a user wrote as a number and a unit, such as 10GB of `BYTES`.

    Raises
    ------
    UsageError    anything else
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2].upper() if match else "?"
    if match is None or unit not in units:
        raise UsageError(f"{flag}: found {text!r}; expected a number and a unit such as {example}")
    return float(match[1]) * units[unit]

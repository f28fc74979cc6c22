"""A memo (place, size, mtime, inode, ctime) -> sha256, and other answers. Deletable; any trouble means ask again."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

from embedpipe.data import Place
from embedpipe.storage import PathLike

RACY_NS = 2_000_000_000  # younger files may change again within one tick of their mtime
BATCH = 1000
MAX_INTEGER = (1 << 63) - 1  # of sqlite; inodes of some file systems are larger
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Identity = tuple[int, int, int, int]

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS keys (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
    " inode INTEGER, ctime_ns INTEGER, key BLOB) WITHOUT ROWID;"
    "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID;"
)


class KeyIndex:
    """Keys of images: sha256 of their bytes, remembered between runs.

    Parameters
    ----------
    path : Path    the sqlite file; default index.sqlite in the user's cache folder
    keep : bool    whether new keys and answers are written to it

    Attributes
    ----------
    hashed : int    how many images had to be read

    >>> index = KeyIndex()
    >>> index.key_of(Path("a.jpg"))
    """

    def __init__(self, path: Path | None = None, *, keep: bool = True) -> None:
        self.hashed, self._keep = 0, keep
        self._lock = threading.Lock()
        self._new: list[tuple[bytes | int, ...]] = []
        path = path or Path(platformdirs.user_cache_dir("embedpipe"), "index.sqlite")
        self._database = _connect(path if keep or path.exists() else Path(":memory:"))

    def key_of(self, place: Place | PathLike) -> bytes:
        """Return the sha256 of an image's bytes, 32 bytes.

        Raises
        ------
        OSError       it cannot be read, or is in no regular file
        UsageError    a library that reads it is not installed
        """
        place, now = Place.of(place), time.time_ns()
        name = os.fsencode(place.path) + (b"\0" + os.fsencode(place.part) if place.part else b"")
        before = _identity_of(place)
        known = self._look_up(name, before) if before else None
        if known is not None:
            return known
        key = _digest(place)
        after = _identity_of(place)
        settled = after is not None and after == before and max(after[1], after[3]) < now - RACY_NS
        self._remember((name, *after, key) if settled and after else None)
        return key

    def recall(self, question: str) -> str | None:
        """Return the answer that was remembered for a question, None where there is none or any trouble."""
        with self._lock, suppress(sqlite3.Error):
            row = self._database.execute("SELECT answer FROM answers WHERE question = ?", (question,)).fetchone()
            return row[0] if row and isinstance(row[0], str) else None
        return None

    def remember(self, question: str, answer: str) -> None:
        """Keep an answer; losing it costs time only."""
        if not self._keep:
            return
        with self._lock, suppress(sqlite3.Error), self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (question, answer))

    def close(self) -> None:
        """Write what is new."""
        with self._lock:
            self._flush()
            self._database.close()

    def _look_up(self, name: bytes, identity: Identity) -> bytes | None:
        query = "SELECT key FROM keys WHERE (path, size, mtime_ns, inode, ctime_ns) = (?, ?, ?, ?, ?)"
        with self._lock, suppress(sqlite3.Error):
            row = self._database.execute(query, (name, *identity)).fetchone()
            return row[0] if row and isinstance(row[0], bytes) else None
        return None

    def _remember(self, row: tuple[bytes | int, ...] | None) -> None:
        with self._lock:
            self.hashed += 1
            if row is not None:
                self._new.append(row)
            if len(self._new) >= BATCH:
                self._flush()

    def _flush(self) -> None:
        insert = "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)"
        with suppress(sqlite3.Error), self._database:
            self._database.executemany(insert, self._new if self._keep else [])
        self._new = []


def _digest(place: Place) -> bytes:
    if place.part or place.is_remote:
        return hashlib.sha256(place.read()).digest()
    with open(place.path, "rb") as stream:  # of any size
        return hashlib.file_digest(stream, "sha256").digest()


def _identity_of(place: Place) -> Identity | None:
    """Return what changes with a file: size, mtime, inode, ctime; elsewhere its version, in two numbers; None: unknown."""
    if place.is_remote:
        version = place.version()
        words = hashlib.sha256(version.encode()).digest() if version else b""
        numbers = [int.from_bytes(words[at : at + 8], "big") & MAX_INTEGER for at in (0, 8)]
        return (numbers[0], 0, numbers[1], 0) if version else None
    status = os.stat(place.path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", place.path)
    return status.st_size, status.st_mtime_ns, status.st_ino & MAX_INTEGER, status.st_ctime_ns


def _connect(path: Path) -> sqlite3.Connection:
    """Open the memo; a corrupt one is made anew, and one without a place lives in memory."""
    with suppress(OSError, sqlite3.Error):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _open(path)
        except sqlite3.DatabaseError as exc:
            if exc.sqlite_errorcode in CORRUPT:
                path.unlink()
                return _open(path)
    return _open(":memory:")


def _open(path: Path | str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=0, check_same_thread=False)
    try:
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database

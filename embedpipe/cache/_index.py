"""A per-user memo of image hashes: (path, size, mtime, inode, ctime) -> sha256, in SQLite.

It only saves reading files again. It may be deleted at any time, and after any error of SQLite files are hashed again.
"""

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

from embedpipe.data import ByteSource
from embedpipe.storage import PathLike

RACY_NS = 2_000_000_000  # a file changed more recently may change again without a new mtime
BATCH = 1000
MAX_INTEGER = (1 << 63) - 1  # of SQLite; some file systems have larger inode numbers
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS keys (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
    " inode INTEGER, ctime_ns INTEGER, key BLOB) WITHOUT ROWID;"
    "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID;"
)


class KeyIndex:
    """Keys of images, the sha256 of their bytes, remembered between runs.

    Parameters
    ----------
    path : Path      the SQLite file; default: index.sqlite in the user's cache folder
    keep : bool      whether new keys and texts are written to it
    racy_ns : int    files that changed more recently are not remembered

    Attributes
    ----------
    hashed : int    number of images that had to be read

    >>> index = KeyIndex()
    >>> index.key_of(Path("a.jpg"))
    """

    def __init__(self, path: Path | None = None, *, keep: bool = True, racy_ns: int = RACY_NS) -> None:
        self.hashed, self._keep, self._racy_ns = 0, keep, racy_ns
        self._lock = threading.Lock()
        self._new: list[tuple[bytes | int, ...]] = []
        path = path or Path(platformdirs.user_cache_dir("embedpipe"), "index.sqlite")
        self._database = _connect(path if keep or path.exists() else Path(":memory:"))

    def key_of(self, place: ByteSource | PathLike) -> bytes:
        """Return the sha256 of the bytes of an image, 32 bytes.

        Raises
        ------
        OSError       the image cannot be read, or is not a regular file
        UsageError    a library that reads it is not installed
        """
        place, now = ByteSource.from_path(place), time.time_ns()
        name = os.fsencode(place.path) + (b"\0" + os.fsencode(place.part) if place.part else b"")
        before = _identity_of(place)
        query = "SELECT key FROM keys WHERE (path, size, mtime_ns, inode, ctime_ns) = (?, ?, ?, ?, ?)"
        known = self._select(query, (name, *before)) if before else None
        if isinstance(known, bytes):
            return known
        key = _digest(place)
        after = _identity_of(place)
        with self._lock:
            self.hashed += 1
            if after is not None and after == before and max(after[1], after[3]) < now - self._racy_ns:
                self._new.append((name, *after, key))
            if len(self._new) >= BATCH:
                self._flush()
        return key

    def get_text(self, name: str) -> str | None:
        """Return the text stored under a name, None if there is none or SQLite reports an error."""
        text = self._select("SELECT answer FROM answers WHERE question = ?", (name,))
        return text if isinstance(text, str) else None

    def put_text(self, name: str, text: str) -> None:
        """Store a text under a name; an error of SQLite is ignored."""
        if self._keep:
            with self._lock, suppress(sqlite3.Error), self._database:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, text))

    def close(self) -> None:
        """Write new keys and close the database."""
        with self._lock:
            self._flush()
            self._database.close()

    def _select(self, query: str, values: tuple[bytes | int | str, ...]) -> object:
        with self._lock, suppress(sqlite3.Error):
            return next(self._database.execute(query, values), (None,))[0]
        return None

    def _flush(self) -> None:
        rows, self._new = self._new if self._keep else [], []
        with suppress(sqlite3.Error), self._database:
            self._database.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)", rows)


def _digest(place: ByteSource) -> bytes:
    if place.part or place.is_remote:
        return hashlib.sha256(place.read()).digest()
    with open(place.path, "rb") as stream:  # a local file may be larger than memory
        return hashlib.file_digest(stream, "sha256").digest()


def _identity_of(place: ByteSource) -> tuple[int, int, int, int] | None:
    """Return values that change when a file does: size, mtime, inode and ctime.

    For a remote file these are two numbers made from its version, or None if it has no version.
    """
    if place.is_remote:
        version = place.version()
        if not version:
            return None
        digest = hashlib.sha256(version.encode()).digest()
        first, second = (int.from_bytes(digest[start : start + 8], "big") & MAX_INTEGER for start in (0, 8))
        return first, 0, second, 0
    status = os.stat(place.path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", place.path)
    return status.st_size, status.st_mtime_ns, status.st_ino & MAX_INTEGER, status.st_ctime_ns


def _connect(path: Path) -> sqlite3.Connection:
    """Open the memo; replace a corrupt file, and use memory if no file can be written."""
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

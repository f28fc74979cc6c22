"""The lock of a space: `flock` on a file in its folder, tested before it is relied on.

Some network file systems refuse `flock`, or grant it to everybody. Therefore a writer tries to lock the file a second time
through another descriptor: only if that is refused does the lock exclude other writers.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from embedpipe.errors import CacheBusy
from embedpipe.storage import storage_errors

NAME_POLL_S, NAME_POLLS = 0.05, 10  # how long to wait for the holder to write its name
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class WriterLock:
    """A lock that is held from construction to `close`.

    Attributes
    ----------
    exclusive : bool    whether the lock excludes other writers; if not, the holder may only add files

    Raises
    ------
    CacheBusy       another process holds the lock; the message names process and host
    StorageError    the lock file cannot be opened
    """

    def __init__(self, path: Path) -> None:
        self._named = False
        with storage_errors(path, "lock"):
            self._descriptor = _open(path)
            try:
                self.exclusive = self._acquire(path) and _excludes(path)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Release the lock, and erase the name of the holder."""
        if self._named:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        _close(self._descriptor)

    def _acquire(self, path: Path) -> bool:
        """Take the lock and write the name of this process into the file; return False if locks are not supported."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = _read_holder(self._descriptor)
            hint = "wait for it to end, or choose another --cache-dir"
            raise CacheBusy(f"{path.parent} is being written by {holder}", hint=hint, holder=holder) from exc
        except OSError as exc:
            if exc.errno in UNSUPPORTED:
                return False
            raise
        with suppress(OSError):  # the name is informative only: a full disk must not prevent locking
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            self._named = True
        return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _excludes(path: Path) -> bool:
    """Return True if the file cannot be locked a second time."""
    second = _open(path)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        return isinstance(exc, BlockingIOError)
    finally:
        _close(second)
    return False


def _read_holder(descriptor: int) -> str:
    """Return the name of the holder, who writes it a moment after taking the lock."""
    for _ in range(NAME_POLLS):
        time.sleep(NAME_POLL_S)
        name = os.pread(descriptor, 200, 0).decode(errors="replace")
        if name:
            return name
    return "another process"


def _close(descriptor: int) -> None:
    with suppress(OSError):  # close releases descriptor and lock even when it reports an error
        os.close(descriptor)

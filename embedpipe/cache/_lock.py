"""One writer a space: flock on a file in its folder, proved to exclude before it is relied on."""

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

NAMED_S, LOOKS = 0.05, 10  # a holder has written its name by then; how often to look for it
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class WriterLock:
    """Held from construction to `release`.

    Attributes
    ----------
    proved : bool    a second taker was refused. False on file systems where flock fails or excludes
                     nobody: then the holder may only add files

    Raises
    ------
    CacheBusy       somebody else holds it; the message names process and host
    StorageError    the lock file cannot be opened
    """

    def __init__(self, path: Path) -> None:
        self._named = False
        with storage_errors(path, "lock"):
            self._descriptor = _open(path)
        try:
            taken = self._take(path)
            self.proved = taken and _excludes(path)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let the next one in; a name that stayed would be told as that of the next holder."""
        if self._named:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        _close(self._descriptor)

    def _take(self, path: Path) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise _busy(path, _holder(self._descriptor)) from exc
        except OSError as exc:
            if exc.errno in LOCKLESS:
                return False
            with storage_errors(path, "lock"):
                raise
        with suppress(OSError):  # who holds it is a courtesy: a full disk must not forbid the lock
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            self._named = True
        return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _excludes(path: Path) -> bool:
    with storage_errors(path, "lock"):
        second = _open(path)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        _close(second)
    return False


def _holder(descriptor: int) -> str:
    """Return who holds the lock: it writes its name a moment after taking it."""
    for _ in range(LOOKS):
        time.sleep(NAMED_S)
        name = os.pread(descriptor, 200, 0).decode(errors="replace")
        if name:
            return name
    return "another process"


def _close(descriptor: int) -> None:
    with suppress(OSError):  # the descriptor is gone and the lock with it, whatever close says of the name in the file
        os.close(descriptor)


def _busy(path: Path, holder: str) -> CacheBusy:
    return CacheBusy(
        f"{path.parent} is being written by {holder}",
        hint="wait for it to end, or name another --cache-dir",
        holder=holder,
    )

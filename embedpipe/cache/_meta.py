"""The folder of a space: the names of its files, meta.json with the metadata, and the lock of the writer.

meta.json holds the spec, the environments that computed rows, and the pins of an unfinished extraction. It is replaced
atomically, and its `seal` is a checksum of the other fields.

The lock is `flock` on a file in the folder, tested before it is relied on. Some network file systems refuse `flock`, or grant
it to everybody. Therefore a writer tries to lock the file a second time through another descriptor: only if that is refused
does the lock exclude other writers.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedpipe.cache._sealed import FORMAT_VERSION, check_version, damage_error
from embedpipe.errors import CacheBusy
from embedpipe.provenance import fingerprint
from embedpipe.storage import storage_errors, write_atomic

FILE, LOCK, FEATURES, SHARDS = "meta.json", ".lock", "features.h5", "shards"
SHARD_NAME = re.compile(r"\d{8,}-[0-9a-f]{32}\.h5")
NAME_POLL_S, NAME_POLLS = 0.05, 10  # how long to wait for the holder to write its name
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Meta:
    """The metadata of a space.

    Attributes
    ----------
    environments : the distinct records of libraries and device that computed rows, oldest first
    pins : of an unfinished extraction; None if the last one finished
    """

    name: str
    spec: dict[str, Any]
    feature_dim: int
    dtype: str
    environments: tuple[dict[str, Any], ...]
    pins: dict[str, Any] | None


def list_shards(folder: Path) -> list[Path]:
    """Return the committed shards of a space, oldest first."""
    shards = folder / SHARDS
    names: list[str] = []
    with storage_errors(shards, "list"), suppress(FileNotFoundError):
        names = os.listdir(shards)
    return [shards / name for name in sorted(names) if SHARD_NAME.fullmatch(name)]


def mark_used(folder: Path) -> None:
    """Set the time of meta.json, which records the last use, to now; a read-only cache is left as it is."""
    with suppress(OSError):
        os.utime(folder / FILE)


def last_used(folder: Path) -> float:
    """Return when a space was last written or read, Unix time in seconds."""
    path = folder / FILE
    return (path if path.exists() else folder).stat().st_mtime


def write_meta(folder: Path, meta: Meta) -> None:
    """Replace meta.json atomically."""
    write_atomic(folder / FILE, _serialize(meta))


def read_meta(folder: Path, expected_fingerprint: str | None = None) -> Meta | None:
    """Return the metadata of a space, or None if the folder has no meta.json.

    Raises
    ------
    CacheMismatch    newer format, changed bytes, or the spec of another space
    """
    path = folder / FILE
    with storage_errors(path, "read", missing_ok=True):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        fields = json.loads(raw)
        version = int(fields.pop("format_version"))
        del fields["fingerprint"], fields["seal"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise damage_error(path, "it is not the metadata of a space") from exc
    check_version(version, path)
    try:
        meta = Meta(**{**fields, "environments": tuple(fields["environments"])})
        intact = _serialize(meta) == raw
        _check_types(meta)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise damage_error(path, "its fields are not those of a space") from exc
    if not intact:
        raise damage_error(path, "its bytes have changed")
    if expected_fingerprint not in (None, fingerprint(meta.spec)):
        raise damage_error(folder, "its spec is that of another space")
    return meta


def _check_types(meta: Meta) -> None:
    valid = type(meta.feature_dim) is int and meta.feature_dim >= 0 and meta.dtype in ("float32", "float16")
    records = [meta.spec, *meta.environments, *([] if meta.pins is None else [meta.pins])]
    if not valid or type(meta.name) is not str or not all(type(record) is dict for record in records):
        raise ValueError("a field has another type")


def _serialize(meta: Meta) -> bytes:
    fields = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(meta.spec), **asdict(meta)}
    sealed = {**fields, "seal": fingerprint(fields)}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


class WriterLock:
    """The lock of the writer of a folder, held from construction to `close`.

    Attributes
    ----------
    exclusive : bool    whether the lock excludes other writers; if not, the holder may only add files

    Raises
    ------
    CacheBusy       another process holds the lock; the message names process and host
    StorageError    the lock file cannot be opened
    """

    def __init__(self, folder: Path) -> None:
        path, self._named = folder / LOCK, False
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

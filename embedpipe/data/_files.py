"""Files and URLs (through fsspec): read a range of bytes, list a folder, get the version of a file.

>>> read_file("s3://bucket/shard.tar", offset=512, size=1000)
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

from embedpipe.errors import UsageError
from embedpipe.storage import storage_errors

URL = re.compile(r"[A-Za-z][\w+.-]*://")
CHECKSUMS = ("etag", "checksum", "md5", "md5hash", "content_md5", "crc32c", "generation", "version_id")
TIMES = ("lastmodified", "last_modified", "mtime", "modified", "updated", "created")
SETTLED_S = 2.0  # a file modified later than this before now may change again and keep its modification time
FRESH_S = 2.0  # for how long a version is reused: thousands of tar members share one URL


def is_url(path: str) -> bool:
    """Return True if the path begins with a scheme such as s3://."""
    return URL.match(path) is not None


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """Return `size` bytes from `offset` on, all of them if `size` is -1; fewer at the end of the file."""
    if not is_url(path):
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)
    with _file_system(path) as (system, inner):
        # keywords, because the second positional parameter of s3fs is a version
        return bytes(system.cat_file(inner, start=offset, end=offset + size) if size >= 0 else system.cat_file(inner))


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading and seeking.

    Raises
    ------
    OSError    it cannot be opened
    """
    if not is_url(path):
        return open(path, "rb")
    with _file_system(path) as (system, inner):
        stream: IO[bytes] = system.open(inner, "rb")
        return stream


def list_url(url: str) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it."""
    with _file_system(url) as (system, path):
        system.invalidate_cache()  # listings from earlier in this process
        paths = [system._strip_protocol(name) for name in system.find(path)]
    root = system._strip_protocol(url).rstrip("/") + "/"
    return sorted(path.removeprefix(root) for path in paths if path.startswith(root))


def file_version(path: str) -> str | None:
    """Return a text that changes with a file; None for a URL whose server gives neither a checksum nor a time.

    It holds the size and modification time, with the inode and change time of a local file, or the size and checksum of a
    remote file if its server has one.
    """
    if is_url(path):
        return _look_up_version(path, time.monotonic() // FRESH_S)
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_ctime_ns}"


@lru_cache(10_000)
def _look_up_version(url: str, period: float) -> str | None:
    with _file_system(url) as (system, path):
        return _version_of({name.lower().replace("-", "_"): value for name, value in system.info(path).items()})


def _version_of(info: Mapping[str, Any]) -> str | None:
    checksums = [f"{name}={info[name]}" for name in CHECKSUMS if info.get(name)]
    times = {name: info[name] for name in TIMES if isinstance(info.get(name), datetime | float | int)}
    seconds = [value.timestamp() if isinstance(value, datetime) else float(value) for value in times.values()]
    is_settled = bool(seconds) and max(seconds) < time.time() - SETTLED_S
    if info.get("size") is None or not (checksums or is_settled):
        return None
    return " ".join([str(info["size"]), *(checksums or [f"{name}={value}" for name, value in times.items()])])


@contextmanager
def _file_system(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a URL, and the path in it; any exception in the block becomes an OSError of one line."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as exc:
        raise UsageError(f"{url!r} needs fsspec", hint="pip install 'embedpipe[remote]'") from exc
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as exc:
        hint = "pip install the file system of that scheme, such as s3fs or gcsfs"
        raise UsageError(f"{url!r}: {_one_line(exc)}", hint=hint) from exc
    try:
        yield system, path
    except FileNotFoundError as exc:
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from exc
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror or _one_line(exc), url) from exc
    except Exception as exc:
        raise OSError(errno.EIO, f"{type(exc).__name__}: {_one_line(exc)}", url) from exc


def source_errors(path: str, action: str = "read") -> AbstractContextManager[None]:
    """Turn an OSError into a StorageError that names the file or URL."""
    hint = "check the address, the network and your credentials" if is_url(path) else "check its permissions"
    return storage_errors(repr(path), action, hint=hint)


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__

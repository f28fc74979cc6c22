"""URLs, through fsspec: list, read, and tell whether something has changed."""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import IO, Any

from embedpipe.errors import UsageError

URL = re.compile(r"[A-Za-z][\w+.-]*://")
CONTENT = ("etag", "checksum", "md5", "md5hash", "content_md5", "crc32c", "generation", "version_id")
TIMES = ("lastmodified", "last_modified", "mtime", "modified", "updated", "created")
SETTLED_S = 2.0  # a younger file may change again within one tick of its time
FRESH_S = 2.0  # how long an answer about a URL is taken for granted: thousands of members ask for one file
MOST_VERSIONS = 10_000

_versions: dict[str, tuple[float, str | None]] = {}
_lock = threading.Lock()


def is_url(path: str) -> bool:
    """Whether it begins with a scheme such as s3://."""
    return URL.match(path) is not None


def read_url(url: str, offset: int, size: int) -> bytes:
    """Return `size` bytes from `offset` on, all where `size` is -1; fewer where there are no more."""
    system, path = _open_system(url)
    with _remote_errors(url):
        # by name: the second of s3fs is a version
        return bytes(system.cat_file(path, start=offset, end=offset + size) if size >= 0 else system.cat_file(path))


def open_url(url: str) -> IO[bytes]:
    """Open a URL for reading and seeking."""
    system, path = _open_system(url)
    with _remote_errors(url):
        stream: IO[bytes] = system.open(path, "rb")
        return stream


def list_url(url: str) -> list[str]:
    """Return the paths, relative to a folder, of all files below it, sorted."""
    system, path = _open_system(url)
    with _remote_errors(url):
        system.invalidate_cache()  # of what was listed before in this process
        found = [system._strip_protocol(name) for name in system.find(path)]
    root = system._strip_protocol(url).rstrip("/") + "/"
    return sorted(name.removeprefix(root) for name in found if name.startswith(root))


def url_version(url: str) -> str | None:
    """Return size and checksum, or size and time, of what a URL names; None where its file system gives neither."""
    with _lock:
        asked_s, version = _versions.get(url, (-FRESH_S, None))
    if time.monotonic() - asked_s < FRESH_S:
        return version
    system, path = _open_system(url)
    with _remote_errors(url):
        known = {name.lower().replace("-", "_"): value for name, value in system.info(path).items()}
    version = _version_of(known)
    with _lock:
        if len(_versions) >= MOST_VERSIONS:
            _versions.clear()
        _versions[url] = (time.monotonic(), version)
    return version


def _version_of(known: dict[str, Any]) -> str | None:
    content = [f"{name}={known[name]}" for name in CONTENT if known.get(name)]
    times = {name: known[name] for name in TIMES if isinstance(known.get(name), datetime | float | int)}
    seconds = [one.timestamp() if isinstance(one, datetime) else float(one) for one in times.values()]
    if known.get("size") is None or not (content or (seconds and max(seconds) < time.time() - SETTLED_S)):
        return None
    return " ".join([str(known["size"]), *(content or [f"{name}={one}" for name, one in times.items()])])


def _open_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as exc:
        raise UsageError(f"{url!r} needs fsspec", hint="pip install 'embedpipe[remote]'") from exc
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as exc:
        hint = "pip install the file system of that scheme, such as s3fs or gcsfs"
        raise UsageError(f"{url!r}: {_one_line(exc)}", hint=hint) from exc
    return system, path


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Turn whatever the client of a file system raises into an OSError of one line."""
    try:
        yield
    except FileNotFoundError as exc:
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from exc
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror or _one_line(exc), url) from exc
    except Exception as exc:
        raise OSError(errno.EIO, f"{type(exc).__name__}: {_one_line(exc)}", url) from exc


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__

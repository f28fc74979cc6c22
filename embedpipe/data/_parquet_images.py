"""Rows of Parquet files: the row groups read last stay in memory for the rows beside."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import IO, Any

from embedpipe.errors import UsageError

MOST_BYTES = 512 << 20  # of row groups held; the one at hand may be larger


class _Groups:
    """Columns of row groups by (file and version, group, column); each is read once, whoever asks first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int, str], Future[Any]] = OrderedDict()

    def get(self, key: tuple[str, int, str], read: Callable[[], Any]) -> Any:
        """Return what `read` does for a key."""
        with self._lock:
            future = self._held.get(key)
            mine = future is None
            future = self._held[key] = future or Future()
            self._held.move_to_end(key)
        if mine:
            try:
                future.set_result(read())
            except BaseException as exc:
                future.set_exception(exc)
                with self._lock:
                    del self._held[key]
                raise
            self._shrink()
        return future.result()

    def _shrink(self) -> None:
        with self._lock:
            done = [key for key, one in self._held.items() if one.done()]
            total = sum(self._held[key].result().nbytes for key in done)
            for key in done[:-1]:
                if total <= MOST_BYTES:
                    break
                total -= self._held.pop(key).result().nbytes


_groups = _Groups()


def open_parquet(stream: IO[bytes]) -> Any:
    """Return the `pyarrow.parquet.ParquetFile` in a stream.

    Raises
    ------
    OSError       not Parquet
    UsageError    pyarrow is not installed
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as exc:
        raise UsageError("Parquet files need pyarrow", hint="pip install 'embedpipe[parquet]'") from exc
    try:
        return parquet.ParquetFile(stream)
    except pyarrow.ArrowException as exc:
        raise OSError(f"not Parquet: {str(exc).splitlines()[0]}") from exc


def read_parquet_row(open_stream: Callable[[], IO[bytes]], version: str, location: str) -> bytes:
    """Return the bytes in one row.

    Parameters
    ----------
    open_stream : callable    opens the file
    version : str             its path, and what changes with it
    location : str            "row GROUP:ROW COLUMN"

    Raises
    ------
    OSError    no such row, nothing in it, or the file cannot be read
    """
    _, numbers, column = location.split(" ", 2)
    group, row = map(int, numbers.split(":"))
    values = _groups.get((version, group, column), lambda: _read_group(open_stream, group, column))
    if row >= len(values):
        raise OSError("changed while reading")
    return bytes_of(values[row].as_py())


def bytes_of(value: Any) -> bytes:
    """Return the bytes of a cell: a binary one, or {bytes, path} as `datasets` writes images."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise OSError("no bytes in this row")
    return data


def _read_group(open_stream: Callable[[], IO[bytes]], group: int, column: str) -> Any:
    from pyarrow import ArrowException

    with open_stream() as stream:
        try:
            return open_parquet(stream).read_row_group(group, columns=[column]).column(column)
        except (ArrowException, KeyError, IndexError) as exc:
            raise OSError(f"Parquet: {(str(exc).splitlines() or [''])[0]}") from exc

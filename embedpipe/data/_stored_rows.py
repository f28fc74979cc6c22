"""Images stored in rows: of Parquet files, and of data sets that the `datasets` library loads (hf:NAME).

A split of such a data set is called hf:NAME[:CONFIG]/SPLIT, where NAME is `data`, `owner/data` or the absolute path of a
folder written by `save_to_disk`.

>>> read_hub_row("hf:cifar10/train", "row 17 img")
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from typing import IO, Any

from embedpipe.errors import UsageError

HUB = "hf:"
SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


class ColumnCache:
    """Image columns of the Parquet row groups used last, so that neighbouring rows do not read the file again.

    Several threads that need the same column wait for one of them to read it.

    Parameters
    ----------
    max_bytes : int    total size of the columns; the column in use may be larger
    """

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._columns: OrderedDict[tuple[str, int, str], Future[Any]] = OrderedDict()

    def get(self, key: tuple[str, int, str], read: Callable[[], Any]) -> Any:
        """Return the column of (file and version, row group, column name), from `read` if it is not in memory."""
        with self._lock:
            is_new = key not in self._columns
            future = self._columns.setdefault(key, Future())
            self._columns.move_to_end(key)
        if is_new:
            try:
                future.set_result(read())
            except BaseException as exc:
                with self._lock:
                    del self._columns[key]
                future.set_exception(exc)
                raise
            self._evict()
        return future.result()

    def sizes(self) -> dict[tuple[str, int, str], int]:
        """Return the bytes of each column in memory, least recently used first."""
        return {key: column.result().nbytes for key, column in self._columns.items() if column.done()}

    def _evict(self) -> None:
        with self._lock:
            sizes = self.sizes()
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total <= self._max_bytes:
                    break
                del self._columns[key]
                total -= sizes[key]


_columns = ColumnCache()


def open_parquet(stream: IO[bytes]) -> Any:
    """Return the `pyarrow.parquet.ParquetFile` in a stream.

    Raises
    ------
    OSError       the content is not Parquet
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


def read_parquet_row(
    open_stream: Callable[[], IO[bytes]], version: str, location: str, columns: ColumnCache = _columns
) -> bytes:
    """Return the image bytes in a row.

    Parameters
    ----------
    open_stream : callable    opens the file
    version : str             the path of the file, and its version
    location : str            "row GROUP:ROW COLUMN"
    columns : ColumnCache     where columns stay in memory

    Raises
    ------
    OSError    the row does not exist or holds no bytes, or the file cannot be read
    """
    _, numbers, column = location.split(" ", 2)
    group, row = map(int, numbers.split(":"))
    values = columns.get((version, group, column), lambda: _read_column(open_stream, group, column))
    if row >= len(values):
        raise OSError("changed while reading")
    return _bytes_of(values[row].as_py())


def _read_column(open_stream: Callable[[], IO[bytes]], group: int, column: str) -> Any:
    from pyarrow import ArrowException

    with open_stream() as stream:
        try:
            return open_parquet(stream).read_row_group(group, columns=[column]).column(column)
        except (ArrowException, KeyError, IndexError) as exc:
            raise OSError(f"Parquet: {(str(exc).splitlines() or [''])[0]}") from exc


def _bytes_of(cell: Any) -> bytes:
    """Return the bytes of a binary cell, or of {bytes, path}, as `datasets` writes images."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise OSError("no bytes in this row")
    return data


def parse_hub(argument: str) -> tuple[str, str]:
    """Split hf:NAME[:CONFIG][@SPLIT] into hf:NAME[:CONFIG], with the absolute path of a folder, and SPLIT or ""."""
    text = argument.removeprefix(HUB)
    name, _, split = (text, "", "") if os.path.isdir(text) else text.partition("@")
    return HUB + (os.path.abspath(name) if os.path.isdir(name) else name), split


@lru_cache(16)
def open_split(root: str, split: str) -> Any:
    """Return the `datasets.Dataset` of a split of hf:NAME[:CONFIG], or the `DatasetDict` of all splits for "".

    Raises
    ------
    UsageError    `datasets` is not installed, or the data set does not load
    """
    try:
        import datasets
    except ImportError as exc:
        raise UsageError(f"{root!r} needs datasets", hint="pip install 'embedpipe[hf]'") from exc
    text = root.removeprefix(HUB)
    name, _, config = (text, "", "") if os.path.isdir(text) else text.partition(":")
    try:
        if any(os.path.exists(os.path.join(name, file)) for file in SAVED):
            return _saved_split(datasets.load_from_disk(name), split)
        return datasets.load_dataset(name, config or None, split=split or None)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise UsageError(
            f"{root}{'@' if split else ''}{split}: {reason}",
            hint="expected hf:NAME[:CONFIG][@SPLIT], or hf:FOLDER as save_to_disk writes it",
        ) from exc


def _saved_split(saved: Any, split: str) -> Any:
    """Return a split of what `load_from_disk` loaded; a single `Dataset` without a split name is train."""
    import datasets

    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    if split and split not in saved:
        raise ValueError(f"no split {split!r}, expected {' or '.join(saved)}")
    return saved[split] if split else saved


@lru_cache(64)
def _open_column(path: str, column: str) -> Any:
    import datasets

    root, _, split = path.rpartition("/")
    return open_split(root, split).select_columns([column]).cast_column(column, datasets.Image(decode=False))


def read_hub_row(path: str, location: str) -> bytes:
    """Return the image bytes in a row of a split.

    Parameters
    ----------
    path : str        hf:NAME[:CONFIG]/SPLIT
    location : str    "row ROW COLUMN"

    Raises
    ------
    OSError    the row holds no bytes, or the file that it names cannot be read
    """
    _, row, column = location.split(" ", 2)
    cell = _open_column(path, column)[int(row)][column]
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        with open(cell["path"], "rb") as stream:
            return stream.read()
    return _bytes_of(cell)


def hub_version(path: str) -> str | None:
    """Return the fingerprint that `datasets` gives a split."""
    root, _, split = path.rpartition("/")
    fingerprint = getattr(open_split(root, split), "_fingerprint", None)
    return fingerprint if isinstance(fingerprint, str) else None


def forget_splits() -> None:
    """Load data sets again when they are next used."""
    open_split.cache_clear()
    _open_column.cache_clear()

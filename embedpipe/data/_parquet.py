"""Parquet files: tables of paths (with the columns of a CSV table), or of images.

Images are binary cells, or structs {bytes, path} as `datasets` writes them, in the column `image`, `img` or `bytes`, or in the
only column of structs. Labels are in `label` (or `class`), `labels` or `target`. Class numbers become names where the schema
metadata of `datasets` names them. The split of a row is in `split`, else in the name of its file (`train-000.parquet`).
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from embedpipe.data._files import open_file, source_errors
from embedpipe.data._folder import splits_of_shards
from embedpipe.data._labels import TASK_OF_COLUMN, check_label_columns, class_label, label_of_cells
from embedpipe.data._source import Listing, Row, Source, folder_of, join
from embedpipe.data._tables import COLUMNS, Record, cell_texts, check_columns, rows_of_paths, split_of_cell
from embedpipe.errors import UsageError

IMAGE_COLUMNS = ("image", "img", "bytes")


def list_parquet(source: Source, names: Sequence[str], *, allow_outside: bool) -> Listing:
    """List the images of .parquet files with these names, relative to the root of their source.

    Raises
    ------
    UsageError      there is no column of paths or images, or a value is not valid; the message names the row
    StorageError    a file cannot be read, or is not Parquet
    """
    splits, rows = splits_of_shards(names), []
    for name in names:
        file = join(source.root, name)
        with source_errors(file), open_file(file) as stream:
            table = open_parquet(stream)
            image = _image_column(table.schema_arrow)
            if image is None:
                found = _rows_of_paths(table, name, folder_of(file), allow_outside)
            else:
                found = _rows_of_images(table, name, image)
            rows += [replace(row, split=row.split or splits.get(name, "")) for row in found]
    return Listing(source, tuple(rows))


def _image_column(schema: Any) -> str | None:
    """Return the name of the column that holds images, None without one."""
    from pyarrow import types

    structs, binaries = [], []
    for field in schema:
        if types.is_struct(field.type) and {"bytes", "path"} <= {child.name for child in field.type}:
            structs.append(field.name)
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            binaries.append(field.name)
    columns = [name for name in (*structs, *binaries) if "/" not in name]
    known = [name for image in IMAGE_COLUMNS for name in columns if name.lower() == image]
    return next(iter(known or (structs if len(structs) == 1 else [])), None)


def _records(table: Any, columns: Mapping[str, str], name: str) -> Iterator[Record]:
    """Yield the cells of each row as texts, by column; `columns` gives the name of each column in the file."""
    cells = table.read(columns=list(columns.values())).to_pydict() if columns else {}
    for n in range(table.metadata.num_rows):
        at = f"{name}, row {n}"
        yield at, cell_texts(((column, cells[written][n]) for column, written in columns.items()), at)


def _rows_of_paths(table: Any, name: str, folder: str, allow_outside: bool) -> Iterator[Row]:
    written = table.schema_arrow.names
    by_name = dict(zip(check_columns(written, name), written, strict=True))
    columns = {column: by_name[column] for column in COLUMNS if column in by_name}
    classes = _class_names(table.schema_arrow, columns)
    root = folder if "://" in folder else Path(folder)
    for row in rows_of_paths(_records(table, columns, name), root, allow_outside):
        path = os.path.join(os.path.dirname(name), row.path)
        yield replace(row, path=path, label=class_label(row.label, row.task, classes))


def _rows_of_images(table: Any, name: str, image: str) -> Iterator[Row]:
    schema, metadata = table.schema_arrow, table.metadata
    by_name = {written.lower(): written for written in schema.names}
    by_name["label"] = by_name.get("label", by_name.get("class", ""))
    columns = {column: by_name[column] for column in COLUMNS[1:] if by_name.get(column)}
    check_label_columns(columns, name)
    classes = _class_names(schema, columns)
    is_struct = schema.field(image).type.num_fields > 0
    images = table.read(columns=[f"{image}.path"]).to_pydict()[image] if is_struct else [None] * metadata.num_rows
    sizes = [metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    positions = (f"{group}:{row}" for group, size in enumerate(sizes) for row in range(size))
    for (at, cells), position, cell in zip(_records(table, columns, name), positions, images, strict=True):
        label, task = label_of_cells(cells, at)
        file = os.path.basename((cell or {}).get("path") or "")
        yield Row(
            path=name,
            label=class_label(label, task, classes),
            split=split_of_cell(cells.get("split", ""), at),
            group=cells.get("group", "").strip() or None,
            part=f"row {position} {image}" + (f"/{file}" if file else ""),
            task=task,
        )


def _class_names(schema: Any, columns: Mapping[str, str]) -> list[str]:
    """Return the class names of the label column that `datasets` records in the schema; [] without them."""
    label = next((columns[column] for column in TASK_OF_COLUMN if column in columns), None)
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        names = feature["names"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


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
            with self._lock:
                sizes = self.sizes()
                while len(sizes) > 1 and sum(sizes.values()) > self._max_bytes:
                    oldest = next(iter(sizes))
                    del sizes[oldest], self._columns[oldest]
        return future.result()

    def sizes(self) -> dict[tuple[str, int, str], int]:
        """Return the bytes of each column in memory, least recently used first."""
        return {key: column.result().nbytes for key, column in self._columns.items() if column.done()}


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


def read_parquet_row(path: str, version: str, location: str, columns: ColumnCache = _columns) -> bytes:
    """Return the image bytes in a row.

    Parameters
    ----------
    path : str               a file or a URL
    version : str            a text that changes with the file
    location : str           "row GROUP:ROW COLUMN"
    columns : ColumnCache    where columns stay in memory

    Raises
    ------
    OSError    the row does not exist or holds no bytes, or the file cannot be read
    """
    _, numbers, column = location.split(" ", 2)
    group, row = map(int, numbers.split(":"))
    values = columns.get((f"{path} {version}", group, column), lambda: _read_column(path, group, column))
    if row >= len(values):
        raise OSError("changed while reading")
    return bytes_of_cell(values[row].as_py())


def _read_column(path: str, group: int, column: str) -> Any:
    from pyarrow import ArrowException

    with open_file(path) as stream:
        try:
            return open_parquet(stream).read_row_group(group, columns=[column]).column(column)
        except (ArrowException, KeyError, IndexError) as exc:
            raise OSError(f"Parquet: {(str(exc).splitlines() or [''])[0]}") from exc


def bytes_of_cell(cell: Any) -> bytes:
    """Return the bytes of a binary cell, or of {bytes, path}, as `datasets` writes images."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise OSError("no bytes in this row")
    return data

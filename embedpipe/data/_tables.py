"""Tables of paths: CSV, TSV and JSONL files with the columns `path`, `label` (or `labels`, or `target`), `split`, `group`.

::

    path,label,split,group
    scans/1.png,benign,train,patient-7

All columns but `path` are optional, others are ignored. Paths are relative to the folder of the table. Text is UTF-8 (with or
without a byte order mark), or UTF-16 with one; other bytes pass through unchanged, as in file names.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from embedpipe.data._files import is_url, read_file, source_errors
from embedpipe.data._folder import SPLIT_NAMES
from embedpipe.data._labels import LABEL_SEPARATOR, TASK_OF_COLUMN, check_label_columns, label_of_cells
from embedpipe.data._source import Listing, Row, Source, join, suffix_of
from embedpipe.errors import UsageError

COLUMNS = ("path", *TASK_OF_COLUMN, "split", "group")
Record = tuple[str, dict[str, str]]  # where a row is, for messages ("list.csv, line 3"), and its cells


def list_table(source: Source, name: str, *, allow_outside: bool) -> Listing:
    """List the images in a .csv, .tsv or .jsonl table with this name in the root of its source.

    Raises
    ------
    UsageError      a line, column or value is not valid; the message names the line
    StorageError    the file cannot be read
    """
    file = join(source.root, name)
    with source_errors(file):
        text = _decode(read_file(file))
    records = _json_records(text, name) if suffix_of(name) == ".jsonl" else _csv_records(text, name)
    return Listing(source, rows_of_paths(records, source.root, allow_outside))


def _decode(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _csv_records(text: str, file: str) -> Iterator[Record]:
    """Read CSV or TSV. The delimiter of a .csv file is the most frequent of `,` `;` and tab in its header."""
    delimiter = max("\t" if suffix_of(file) == ".tsv" else ",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = check_columns(next(reader, []), f"{file}, line 1")
        for cells in reader:
            at = f"{file}, line {reader.line_num}"
            if any(cells[len(columns) :]):
                hint = 'quote values that hold the delimiter: "a,b.jpg"'
                raise UsageError(f"{at}: found {len(cells)} values, expected {len(columns)}", hint=hint)
            if any(cells):
                yield at, dict(zip(columns, cells, strict=False))
    except csv.Error as exc:
        raise UsageError(f"{file}, line {reader.line_num}: {exc}", hint="check the quotes on that line") from exc


def _json_records(text: str, file: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        at = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise UsageError(f"{at}: not JSON ({exc})", hint="write one object per line") from exc
        if not isinstance(record, dict):
            raise UsageError(f"{at}: found {line[:40]!r}, expected a JSON object")
        values = zip(check_columns(list(record), at), record.values(), strict=True)
        yield at, cell_texts(((column, value) for column, value in values if column in COLUMNS), at)


def cell_texts(values: Iterable[tuple[str, object]], at: str) -> dict[str, str]:
    """Return the values of a record as texts, without the columns whose value is None.

    Raises
    ------
    UsageError    a value is not text or a number, nor, in the column `labels`, a list of such
    """
    return {column: _cell_text(value, at, column) for column, value in values if value is not None}


def _cell_text(value: object, at: str, column: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    if column != "labels" or not isinstance(value, list):
        raise UsageError(f"{at}: {column} is {value!r}, expected text or a number")
    if any(isinstance(name, bool) or not isinstance(name, str | int) or LABEL_SEPARATOR in str(name) for name in value):
        raise UsageError(f"{at}: labels are {value!r}, expected a list of names without {LABEL_SEPARATOR!r}")
    return LABEL_SEPARATOR.join(map(str, value))


def check_columns(written: list[str], at: str) -> list[str]:
    """Return column names in lower case.

    Raises
    ------
    UsageError    `path` is missing, a column stands twice, has nearly the name of a missing one, or there are two of labels
    """
    names = [name.strip().lower() for name in written]
    needless = TASK_OF_COLUMN.keys() if TASK_OF_COLUMN.keys() & names else ()  # one column of labels is enough
    missing = [name for name in COLUMNS if name not in names and name not in needless]
    for name in (name for name in names if name not in COLUMNS):
        meant = difflib.get_close_matches(name, missing, n=1, cutoff=0.75)
        if meant:
            raise UsageError(f"{at}: unknown column {name!r}", hint=f"did you mean {meant[0]!r}?")
    if "path" in missing or any(names.count(name) > 1 for name in COLUMNS):
        found = f"{at}: found the columns {', '.join(names) or '(none)'}"
        message = f"{found}, expected path[,label][,split][,group], each once"
        raise UsageError(message, hint="call the column of file names 'path'")
    check_label_columns(names, at)
    return names


def rows_of_paths(records: Iterable[Record], root: Path | str, allow_outside: bool) -> tuple[Row, ...]:
    """Return the rows of the records of one table, whose paths are relative to `root`.

    Raises
    ------
    UsageError    a cell is not valid, or a label or split is missing where other rows have one
    """
    _realpath.cache_clear()  # links may have changed since the last table
    rows = [(at, _row(cells, root, at, allow_outside)) for at, cells in records]
    for field in ("label", "split"):
        empty = [at for at, row in rows if not getattr(row, field)]
        if empty and len(empty) < len(rows):
            message = f"{empty[0]}: no {field}, though {len(rows) - len(empty)} other rows have one"
            raise UsageError(message, hint=f"give every row a {field}, or none")
    columns = {task: column for column, task in TASK_OF_COLUMN.items()}
    labelled = [(at, columns[row.task]) for at, row in rows if row.label is not None]
    for at, column in labelled:
        if column != labelled[0][1]:
            message = f"{at}: found {column}, though other rows have {labelled[0][1]}"
            raise UsageError(message, hint="give every row the same column")
    return tuple(row for _, row in rows)


def _row(cells: dict[str, str], root: Path | str, at: str, allow_outside: bool) -> Row:
    path, group = cells.get("path", ""), cells.get("group", "")
    label, task = label_of_cells(cells, at)
    for text in (path, label or "", group):
        _check_text(text, at)
    path = _relative_path(path, root, at, allow_outside)
    return Row(path, label, split_of_cell(cells.get("split", ""), at), group.strip() or None, task=task)


def _check_text(text: str, at: str) -> None:
    try:
        is_valid = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise UsageError(f"{at}: {text!r} holds characters that no file name can have")


def split_of_cell(text: str, at: str) -> str:
    """Return the split that a cell names, "" for an empty cell."""
    name = text.strip().lower()
    if name and name not in SPLIT_NAMES:
        raise UsageError(f"{at}: found the split {name!r}", hint="expected train, val or test")
    return SPLIT_NAMES.get(name, "")


def _relative_path(path: str, root: Path | str, at: str, allow_outside: bool) -> str:
    """Return the normalised path below `root`, which is the path that will be opened.

    Raises
    ------
    UsageError    the path is empty, or lies outside `root` (also through a symbolic link) without `allow_outside`
    """
    if not path.strip():
        raise UsageError(f"{at}: no path", hint="give every row the path of an image")
    through = ""
    if is_url(str(root)) or is_url(path):
        relative = path if is_url(path) else os.path.normpath(path)
        is_inside = not (is_url(path) or relative.startswith("/") or relative.split("/")[0] == "..")
    else:
        below, normal = os.path.join(root, ""), os.path.normpath(os.path.join(root, path))
        is_below = normal.startswith(below)
        relative = normal.removeprefix(below) if is_below else path
        is_inside = is_below and (allow_outside or _is_really_below(Path(root), normal))
        through = ", through a link" if is_below else ""
    if is_inside or allow_outside:
        return relative
    hint = "move the table above its images, or allow paths outside with --allow-outside"
    raise UsageError(f"{at}: {path!r} leaves the folder of the table{through}", hint=hint)


def _is_really_below(root: Path, normal: str) -> bool:
    """Return True if a path that is below `root` by name still is when links are followed."""
    folder, name = os.path.split(normal)
    real = os.path.join(_realpath(folder), name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    return real.startswith(os.path.join(_realpath(str(root)), ""))


@cache
def _realpath(folder: str) -> str:
    return os.path.realpath(folder)

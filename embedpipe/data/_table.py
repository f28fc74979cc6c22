"""Tables: CSV, TSV and JSONL with the columns `path`, `label` (or `labels`, or `target`), `split`, `group`.

Other columns are ignored. Text is UTF-8 (with or without a byte order mark), or UTF-16 with one; bytes that are neither
pass through unchanged, as in file names. Paths are relative to the folder of the table.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from embedpipe.data._byte_source import Place
from embedpipe.data._folder import SPLIT_NAMES
from embedpipe.data._manifest import Listing, Row
from embedpipe.data._remote import is_url
from embedpipe.data._source import Source, join, suffix_of
from embedpipe.data._targets import SEPARATOR, TASKS, check_columns_of_targets, read_target
from embedpipe.errors import StorageError, UsageError

COLUMNS = ("path", *TASKS, "split", "group")
Record = tuple[str, dict[str, str]]  # where it stands ("list.csv, line 3") and its cells


def list_table(source: Source, name: str, *, allow_outside: bool) -> Listing:
    """Read a .csv, .tsv or .jsonl table, of that name in the root of its source.

    Raises
    ------
    UsageError      a line, a column or a value that cannot be what was meant; the line is named
    StorageError    the file cannot be read
    """
    file = join(source.root, name)
    with reading(file):
        text = _decode(Place(file).read())
    records = _json_lines(text, name) if suffix_of(name) == ".jsonl" else _cells(text, name)
    return Listing(source, rows_of(records, source.root, allow_outside))


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Say which table cannot be read."""
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        hint = "check the address, the network and your credentials" if is_url(file) else "check its permissions"
        raise StorageError(f"could not read {file!r}: {exc.strerror or exc}", hint=hint) from exc


def rows_of(records: Iterable[Record], root: Path | str, allow_outside: bool) -> tuple[Row, ...]:
    """Return the rows that records say, paths relative to `root`; a label or a split is in all or in none."""
    _real.cache_clear()  # links may have changed since the last table
    rows = [(at, _row(cells, root, at, allow_outside)) for at, cells in records]
    for column in ("label", "split"):
        _check_complete(rows, column)
    _check_one_task(rows)
    return tuple(row for _, row in rows)


def _decode(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _cells(text: str, file: str) -> Iterator[Record]:
    """Read CSV or TSV; the delimiter of a .csv is whichever of `,` `;` tab its header has most."""
    candidates = "\t" if suffix_of(file) == ".tsv" else ",;\t"
    delimiter = max(candidates, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = check_columns(next(reader, []), f"{file}, line 1")
        for cells in reader:
            at = f"{file}, line {reader.line_num}"
            if any(cells[len(columns) :]):
                raise UsageError(
                    f"{at}: found {len(cells)} values, expected {len(columns)}",
                    hint='quote values that hold the delimiter: "a,b.jpg"',
                )
            if any(cells):
                yield at, dict(zip(columns, cells, strict=False))
    except csv.Error as exc:
        at = f"{file}, line {reader.line_num}"
        raise UsageError(f"{at}: {exc}", hint="check the quotes on that line") from exc


def _json_lines(text: str, file: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        at = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise UsageError(f"{at}: not JSON ({exc})", hint="write one object a line") from exc
        if not isinstance(record, dict):
            raise UsageError(f"{at}: found {line[:40]!r}, expected a JSON object")
        columns = check_columns(list(record), at)
        values = zip(columns, record.values(), strict=True)
        yield at, texts_of((one for one in values if one[0] in COLUMNS), at)


def texts_of(values: Iterable[tuple[str, object]], at: str) -> dict[str, str]:
    """Return the cells of a record as texts; a column without a value is left out.

    Raises
    ------
    UsageError    a value that is neither text nor number, nor a list of such in the column `labels`
    """
    return {name: _text_of(value, at, name) for name, value in values if value is not None}


def _text_of(value: object, at: str, column: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    if column != "labels" or not isinstance(value, list):
        raise UsageError(f"{at}: {column} is {value!r}, expected a text or a number")
    if any(isinstance(one, bool) or not isinstance(one, str | int) or SEPARATOR in str(one) for one in value):
        raise UsageError(f"{at}: labels are {value!r}, expected a list of names without {SEPARATOR!r}")
    return SEPARATOR.join(map(str, value))


def check_columns(written: list[str], at: str) -> list[str]:
    """Return the names in lower case; refuse a near miss of ours, one twice, and no `path`."""
    names = [name.strip().lower() for name in written]
    absent = [name for name in COLUMNS if name not in names and not (name in TASKS and TASKS.keys() & names)]
    for name in (one for one in names if one not in COLUMNS):
        meant = difflib.get_close_matches(name, absent, n=1, cutoff=0.75)
        if meant:
            raise UsageError(f"{at}: unknown column {name!r}", hint=f"did you mean {meant[0]!r}?")
    if "path" in absent or any(names.count(name) > 1 for name in COLUMNS):
        raise UsageError(
            f"{at}: found the columns {', '.join(names) or '(none)'}, expected path[,label][,split][,group], each once",
            hint="call the column of file names 'path'",
        )
    check_columns_of_targets(names, at)
    return names


def _row(cells: dict[str, str], root: Path | str, at: str, allow_outside: bool) -> Row:
    path, split, group = (cells.get(name, "") for name in ("path", "split", "group"))
    label, task = read_target(cells, at)
    for text in (path, label or "", group):
        _check_text(text, at)
    return Row(
        path=_relative(path, root, at, allow_outside),
        label=label,
        split=split_of(split, at),
        group=group.strip() or None,
        task=task,
    )


def _check_text(text: str, at: str) -> None:
    try:
        valid = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise UsageError(f"{at}: {text!r} holds characters that no file name can have")


def _relative(path: str, root: Path | str, at: str, allow_outside: bool) -> str:
    """Return the normalised path below `root`: what is checked here is what will be opened.

    Links are followed as far as they stay below the folder of the table.
    """
    if not path.strip():
        raise UsageError(f"{at}: no path", hint="give every row the path of an image")
    if is_url(str(root)) or is_url(path):
        return _relative_url(path, at, allow_outside)
    below, normal = os.path.join(root, ""), os.path.normpath(os.path.join(root, path))
    if normal.startswith(below) and (allow_outside or _stays(Path(root), normal)):
        return normal.removeprefix(below)
    if allow_outside:
        return path
    raise _leaves(path, at, ", through a link" if normal.startswith(below) else "")


def _relative_url(path: str, at: str, allow_outside: bool) -> str:
    """Return a path below a URL, or with leave a URL that stands for itself."""
    normal = path if is_url(path) else os.path.normpath(path)
    if allow_outside or not (is_url(path) or normal.startswith("/") or normal.split("/")[0] == ".."):
        return normal
    raise _leaves(path, at)


def _leaves(path: str, at: str, through: str = "") -> UsageError:
    return UsageError(
        f"{at}: {path!r} leaves the folder of the table{through}",
        hint="move the table above its images, or allow paths outside with --allow-outside",
    )


def _stays(root: Path, normal: str) -> bool:
    """Whether a path that is below `root` by name is so on disk."""
    folder, name = os.path.split(normal)
    real = os.path.join(_real(folder), name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    return real.startswith(os.path.join(_real(str(root)), ""))


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def split_of(text: str, at: str) -> str:
    """Return the split that a cell names."""
    name = text.strip().lower()
    if name and name not in SPLIT_NAMES:
        raise UsageError(f"{at}: found the split {name!r}", hint="expected train, val or test")
    return SPLIT_NAMES.get(name, "")


def _check_complete(rows: list[tuple[str, Row]], column: str) -> None:
    """A column is filled in every row or in none."""
    empty = [at for at, row in rows if not getattr(row, column)]
    if empty and len(empty) < len(rows):
        raise UsageError(
            f"{empty[0]}: no {column}, though {len(rows) - len(empty)} other rows have one",
            hint=f"give every row a {column}, or none",
        )


def _check_one_task(rows: list[tuple[str, Row]]) -> None:
    """All labels come from one column."""
    columns = {task: column for column, task in TASKS.items()}
    labelled = [(at, row.task) for at, row in rows if row.label is not None]
    strange = next(((at, task) for at, task in labelled if task != labelled[0][1]), None)
    if strange:
        raise UsageError(
            f"{strange[0]}: found {columns[strange[1]]}, though other rows have {columns[labelled[0][1]]}",
            hint="give every row the same column",
        )

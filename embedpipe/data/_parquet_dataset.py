"""Parquet: tables of paths (the columns of a CSV table), or of images (bytes, or {bytes, path} as `datasets` writes them).

The column of images is called `image`, `img`, `bytes`, or is the only one of {bytes, path}; the label is in `label` or `class`,
`labels` or `target`, its names in the file's own record of `datasets`, if it has one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedpipe.data._byte_source import open_file
from embedpipe.data._folder import split_of_names
from embedpipe.data._manifest import Listing, Row
from embedpipe.data._parquet_images import open_parquet
from embedpipe.data._source import Source, folder_of, join
from embedpipe.data._table import COLUMNS, check_columns, reading, rows_of, split_of, texts_of
from embedpipe.data._targets import TASKS, check_columns_of_targets, join_names, names_of, read_target
from embedpipe.errors import UsageError

IMAGES = ("image", "img", "bytes")
LABELS = ("label", "class")


def list_parquet(source: Source, names: Sequence[str], *, allow_outside: bool) -> Listing:
    """Read .parquet files of these names in the root of their source.

    Raises
    ------
    UsageError      no column of paths or images, or a value that cannot be what was meant
    StorageError    a file cannot be read, or is not Parquet
    """
    named, rows = split_of_names(names), []
    for name in names:
        file = join(source.root, name)
        with reading(file), open_file(file) as stream:
            table = open_parquet(stream)
            image = _image_column(table.schema_arrow)
            if image is None:
                found = _rows_of_paths(table, name, folder_of(file), allow_outside)
            else:
                found = list(_rows_of_images(table, name, image))
        rows += [replace(row, split=row.split or named.get(name, "")) for row in found]
    return Listing(source, tuple(rows))


def _image_column(schema: Any) -> str | None:
    """Return the name of the column that holds images, None where none does."""
    from pyarrow import types

    structs, holding = [], []
    for field in schema:
        kind = field.type
        if types.is_struct(kind) and {"bytes", "path"} <= {child.name for child in kind}:
            structs.append(field.name)
        elif types.is_binary(kind) or types.is_large_binary(kind):
            holding.append(field.name)
    holding = [name for name in (*structs, *holding) if "/" not in name]
    known = [name for wanted in IMAGES for name in holding if name.lower() == wanted]
    return next(iter(known or structs if len(structs) == 1 else known), None)


def _rows_of_paths(table: Any, name: str, folder: str, allow_outside: bool) -> list[Row]:
    written = table.schema_arrow.names
    columns = dict(zip(check_columns(written, name), written, strict=True))
    taken = {column: columns[column] for column in COLUMNS if column in columns}
    cells = table.read(columns=list(taken.values())).to_pydict()
    names = _class_names(table.schema_arrow, next((taken[column] for column in TASKS if column in taken), None))
    records = (
        (f"{name}, row {n}", texts_of(((column, cells[old][n]) for column, old in taken.items()), f"{name}, row {n}"))
        for n in range(table.metadata.num_rows)
    )
    rows = rows_of(records, folder if "://" in folder else Path(folder), allow_outside)
    above = os.path.dirname(name)
    return [replace(row, path=os.path.join(above, row.path), label=_named(row, names)) for row in rows]


def _rows_of_images(table: Any, name: str, image: str) -> Iterator[Row]:
    schema = table.schema_arrow
    columns = _columns_beside(schema.names, name)
    leaf = [f"{image}.path"] if schema.field(image).type.num_fields else []
    read = table.read(columns=[*columns.values(), *leaf]).to_pydict() if columns or leaf else {}
    classes = _class_names(schema, next((columns[one] for one in TASKS if one in columns), None))
    places = [
        (group, row) for group in range(table.num_row_groups) for row in range(table.metadata.row_group(group).num_rows)
    ]
    for n, (group, row) in enumerate(places):
        at = f"{name}, row {n}"
        texts = texts_of(((one, read[written][n]) for one, written in columns.items()), at)
        label, task = read_target(texts, at)
        inner = os.path.basename((read[image][n] or {}).get("path") or "") if leaf else ""
        found = Row(
            path=name,
            label=label,
            split=split_of(texts.get("split", ""), at),
            group=texts.get("group", "").strip() or None,
            part=f"row {group}:{row} {image}" + (f"/{inner}" if inner else ""),
            task=task,
        )
        yield replace(found, label=_named(found, classes)) if classes else found


def _columns_beside(written: Sequence[str], at: str) -> dict[str, str]:
    """Return the columns beside that of images by what they are to us; `class` is another word for `label`."""
    by_name = {one.lower(): one for one in written}
    label = next((by_name[one] for one in LABELS if one in by_name), None)
    columns = {"label": label} | {one: by_name.get(one) for one in ("labels", "target", "split", "group")}
    found = {one: name for one, name in columns.items() if name is not None}
    check_columns_of_targets(list(found), at)
    return found


def _class_names(schema: Any, label: str | None) -> list[str]:
    """Return the names of a column of ClassLabels or lists of them, as `datasets` records them in a file; [] where it is none."""
    try:
        column = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        column = column[0] if isinstance(column, list) else column.get("feature", column)
        names = column["names"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return []
    return [str(one) for one in names] if isinstance(names, list) else []


def _named(row: Row, names: Sequence[str]) -> str | None:
    """Return the label of a row whose classes may be numbers of `names`."""
    if row.label is None or not names or row.task == "regression":
        return row.label
    if row.task == "multilabel":
        return join_names(_name(one, names) for one in names_of(row.label, row.task))
    return None if row.label == "-1" else _name(row.label, names)


def _name(label: str, names: Sequence[str]) -> str:
    """Return the class of a number."""
    if not label.isdigit() or int(label) >= len(names):
        raise UsageError(f"found the label {label!r}, expected 0 to {len(names) - 1}", hint="write the data set again")
    return names[int(label)]

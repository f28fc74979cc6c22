"""Sample tables: what a data set consists of, one sealed HDF5 file for each data source."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache._features import KEY_BYTES, key_matrix, text_column, texts_of
from embedpipe.cache._sealed import FORMAT_VERSION, Sealed, open_sealed, write_sealed
from embedpipe.cache._structure import damaged
from embedpipe.storage import publish

if TYPE_CHECKING:
    from embedpipe.data import Manifest

TEXTS = ("path", "label", "split", "group")
OPTIONAL = ("part",)  # absent where every image is a whole file
SCHEMA = {
    **dict.fromkeys((*TEXTS, *OPTIONAL), ("S", 1)),
    "key": ("u1", 2),
    "source": ("i4", 1),
    "classes": ("S", 1),
    "warnings": ("S", 1),
    "sources/argument": ("S", 1),
    "sources/absolute": ("S", 1),
    "sources/root": ("S", 1),
}


def dataset_name(manifest: Manifest) -> str:
    """Return `<name>-<id>`; the id is that of the sources, so a new reading replaces it."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", manifest.name).strip("._-")[:64] or "data"
    sources = b"\0".join(os.fsencode(source.absolute) for source in manifest.sources)
    return f"{readable}-{hashlib.sha256(sources).hexdigest()[:12]}"


def write_table(path: Path, manifest: Manifest) -> None:
    """Write the sample table of a manifest; an absent label or group is stored as the empty text, a task but "single" as `task`.

    Files that could not be read are left out: they have no key, and the next run tries them again.
    """
    samples, sources = manifest.samples, manifest.sources
    names = (*TEXTS, *(name for name in OPTIONAL if any(getattr(sample, name) for sample in samples)))
    columns = {name: _texts(getattr(sample, name) for sample in samples) for name in names}
    arrays = {
        **columns,
        "key": key_matrix(sample.key for sample in samples),
        "source": np.array([sample.source for sample in samples], dtype="<i4"),
        "classes": _texts(manifest.classes),
        "warnings": _texts(manifest.warnings),
        "sources/argument": _texts(source.argument for source in sources),
        "sources/absolute": _texts(source.absolute for source in sources),
        "sources/root": _texts(str(source.root) for source in sources),
    }
    attrs: dict[str, int | str] = {
        "name": os.fsencode(manifest.name).hex(),
        "ignored": manifest.ignored,
        "format_version": FORMAT_VERSION,
    }
    if manifest.task != "single":
        attrs["task"] = manifest.task
    publish(path, lambda stream: write_sealed(stream, arrays, attrs))


def read_table(path: Path) -> Manifest:
    """Return the manifest that a sample table holds.

    Raises
    ------
    CacheMismatch    newer format, damaged or foreign
    """
    table = open_sealed(path, SCHEMA, optional=OPTIONAL)
    try:
        return _manifest_of(table)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise damaged(path, "its columns do not fit together") from exc


def _manifest_of(table: Sealed) -> Manifest:
    from embedpipe.data import TASKS, Manifest, Sample, Source, root_of

    columns = {name: texts_of(table.arrays[name]) for name in TEXTS}
    task = table.attrs.get("task", "single")
    if task not in TASKS.values():
        raise ValueError("an unknown task")
    keys = [key.tobytes() for key in table.arrays["key"].reshape(-1, KEY_BYTES)]
    parts = _column(table, "part") if "part" in table.arrays else [""] * len(keys)
    rows = zip(*columns.values(), keys, table.arrays["source"].tolist(), parts, strict=True)
    samples = tuple(
        Sample(path, label or None, split, group or None, key, source, part)
        for path, label, split, group, key, source, part in rows
    )
    pairs = zip(_column(table, "sources/argument"), _column(table, "sources/root"), strict=True)
    sources = tuple(Source(argument, root_of(root)) for argument, root in pairs)
    if not {sample.source for sample in samples} <= set(range(len(sources))):
        raise ValueError("a sample of no source")
    return Manifest(
        name=os.fsdecode(bytes.fromhex(table.attrs["name"])),
        sources=sources,
        samples=samples,
        classes=tuple(_column(table, "classes")),
        ignored=table.attrs["ignored"],
        unreadable=(),
        warnings=tuple(_column(table, "warnings")),
        task=task,
    )


def reads(path: Path, source: str) -> bool:
    """Whether the table is that of the folder, file or URL `source`."""
    from embedpipe.data import absolute_argument

    table = open_sealed(path, SCHEMA, optional=OPTIONAL)
    return absolute_argument(source) in _column(table, "sources/absolute")


def _column(table: Sealed, name: str) -> list[str]:
    return texts_of(table.arrays[name])


def _texts(values: Iterable[str | None]) -> Any:
    return text_column(value or "" for value in values)

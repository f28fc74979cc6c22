"""Sample tables: the samples, classes and sources of each data set, one sealed HDF5 file per set of sources.

Features are stored apart from paths, labels and splits, so renaming or relabelling images computes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from embedpipe.cache._features import KEY_BYTES, decode_texts, encode_texts, key_matrix
from embedpipe.cache._sealed import FORMAT_VERSION, build_header, damage_error, open_sealed, seal
from embedpipe.data import TASK_OF_COLUMN, Manifest, Sample, Source, absolute_argument, parse_root
from embedpipe.storage import write_atomic

TEXTS = ("path", "label", "split", "group")
OPTIONAL = ("part",)  # absent if every image is a whole file
SOURCE_FIELDS = ("argument", "absolute", "root")
SCHEMA = dict.fromkeys((*TEXTS, *OPTIONAL, "classes", "warnings", *(f"sources/{n}" for n in SOURCE_FIELDS)), ("S", 1))
SCHEMA |= {"key": ("u1", 2), "source": ("i4", 1)}


def dataset_name(manifest: Manifest) -> str:
    """Return `<name>-<id>`; the id is a hash of the absolute sources, so reading them again gives the same name."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", manifest.name).strip("._-")[:64] or "data"
    sources = b"\0".join(os.fsencode(source.absolute) for source in manifest.sources)
    return f"{readable}-{hashlib.sha256(sources).hexdigest()[:12]}"


def write_table(path: Path, manifest: Manifest) -> None:
    """Write the sample table of a manifest.

    A missing label or group is stored as the empty text, and a task other than "single" as the attribute `task`. Files
    that could not be read have no key and are left out: the next run tries them again.
    """
    samples, sources = manifest.samples, manifest.sources
    names = (*TEXTS, *(name for name in OPTIONAL if any(getattr(sample, name) for sample in samples)))
    arrays = {
        **{name: encode_texts(getattr(sample, name) or "" for sample in samples) for name in names},
        "key": key_matrix(sample.key for sample in samples),
        "source": np.array([sample.source for sample in samples], dtype="<i4"),
        "classes": encode_texts(manifest.classes),
        "warnings": encode_texts(manifest.warnings),
        **{f"sources/{name}": encode_texts(str(getattr(source, name)) for source in sources) for name in SOURCE_FIELDS},
    }
    attrs: dict[str, int | str] = {
        "name": os.fsencode(manifest.name).hex(),
        "ignored": manifest.ignored,
        "format_version": FORMAT_VERSION,
    }
    if manifest.task != "single":
        attrs["task"] = manifest.task
    write_atomic(path, seal(build_header(arrays, attrs)))


def read_table(path: Path) -> Manifest:
    """Return the manifest that a sample table holds.

    Raises
    ------
    CacheMismatch    newer format, or damaged
    """
    table = open_sealed(path, SCHEMA, optional=OPTIONAL)
    try:
        columns = {name: decode_texts(array) for name, array in table.arrays.items() if array.dtype.kind == "S"}
        keys = [key.tobytes() for key in table.arrays["key"].reshape(-1, KEY_BYTES)]
        parts = columns.get("part", [""] * len(keys))
        rows = zip(*(columns[name] for name in TEXTS), keys, table.arrays["source"].tolist(), parts, strict=True)
        samples = tuple(
            Sample(path, label or None, split, group or None, key, source, part)
            for path, label, split, group, key, source, part in rows
        )
        pairs = zip(columns["sources/argument"], columns["sources/root"], strict=True)
        manifest = Manifest(
            name=os.fsdecode(bytes.fromhex(table.attrs["name"])),
            sources=tuple(Source(argument, parse_root(root)) for argument, root in pairs),
            samples=samples,
            classes=tuple(columns["classes"]),
            ignored=table.attrs["ignored"],
            unreadable=(),
            warnings=tuple(columns["warnings"]),
            task=table.attrs.get("task", "single"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise damage_error(path, "its columns do not fit together") from exc
    sources = range(len(manifest.sources))
    if manifest.task not in TASK_OF_COLUMN.values() or any(sample.source not in sources for sample in samples):
        raise damage_error(path, "its columns do not fit together")
    return manifest


def has_source(path: Path, source: str) -> bool:
    """Return True if the folder, file or URL `source` is a source of the table."""
    table = open_sealed(path, SCHEMA, optional=OPTIONAL)
    return absolute_argument(source) in decode_texts(table.arrays["sources/absolute"])

"""One self-contained file of features, labels, paths, splits, classes and keys, for readers that know no embedpipe.

h5        plain HDF5, as `write_sealed` makes it: read with h5py alone
npy       one .npz of plain arrays, no pickle inside
parquet   a column each; a byte that is not UTF-8 is written as \\xNN, and a backslash doubled, so that no name is lost

In h5 and npy texts are bytes: names of files keep theirs, whatever the encoding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from embedpipe.cache._features import key_matrix, text_column
from embedpipe.cache._packing import Array
from embedpipe.cache._sealed import build_head, seal
from embedpipe.cache._structure import Large
from embedpipe.cache._view import CHUNK_BYTES, SpaceView
from embedpipe.data import Manifest, Sample
from embedpipe.errors import UsageError
from embedpipe.provenance import canonical_json


class Exported:
    """Rows of a space with what their data set says of them, ready to be written.

    samples : n Sample, each with a row in the view; one row a sample, in this order
    """

    def __init__(self, manifest: Manifest, samples: tuple[Sample, ...], view: SpaceView) -> None:
        self.view, self.keys = view, [sample.key for sample in samples]
        self.task, self.labels = manifest.task, manifest.targets(samples)
        self.texts = {
            "paths": [manifest.name_of(sample) for sample in samples],
            "splits": [sample.split for sample in samples],
            "groups": [sample.group or "" for sample in samples],
        }
        self.classes = list(manifest.classes)
        self.label_names = [sample.label for sample in samples]

    @property
    def columns(self) -> dict[str, Array]:
        """All arrays but the features."""
        texts = {name: text_column(values) for name, values in {**self.texts, "classes": self.classes}.items()}
        return {**texts, "labels": self.labels, "keys": key_matrix(self.keys)}

    def chunks(self) -> Iterator[Array]:
        """Yield the features, some MiB at a time."""
        step = max(1, CHUNK_BYTES // max(1, self.view.feature_dim * self.view.dtype.itemsize))
        for start in range(0, len(self.keys), step):
            yield self.view.read(self.keys[start : start + step])


def writer_of(format: str, exported: Exported, about: dict[str, str]) -> Callable[[IO[bytes]], None]:
    """Return the function that writes a format to a stream; `about` goes with it where the format has a place for it.

    Raises
    ------
    UsageError    parquet without pyarrow
    """
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as exc:
            raise UsageError(
                "--format parquet needs pyarrow", hint="pip install 'embedpipe[parquet]', or take --format h5"
            ) from exc
    write = {"h5": _write_h5, "npy": _write_npz, "parquet": _write_parquet}[format]
    return lambda stream: write(stream, exported, about)


def _write_h5(stream: IO[bytes], exported: Exported, about: dict[str, str]) -> None:
    view = exported.view
    large = Large("features", (len(exported.keys), view.feature_dim), view.dtype)
    head = build_head(exported.columns, {**about}, large)
    stream.write(seal(head, len(exported.keys) * view.feature_dim * view.dtype.itemsize))
    for chunk in exported.chunks():
        stream.write(chunk.tobytes())


def _write_npz(stream: IO[bytes], exported: Exported, about: dict[str, str]) -> None:
    facts = np.array(canonical_json(about).encode())
    arrays: dict[str, Any] = {"features": exported.view.read(exported.keys), "about": facts, **exported.columns}
    np.savez(stream, **arrays)


def _write_parquet(stream: IO[bytes], exported: Exported, about: dict[str, str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    classes = [_escaped(name) for name in exported.classes]
    width = exported.view.feature_dim
    types = {"features": pa.list_(pa.float32(), width), **dict.fromkeys(exported.texts, pa.string())}
    label = {"single": pa.int64(), "multilabel": pa.list_(pa.float32()), "regression": pa.float64()}[exported.task]
    types |= {"labels": label, "label_names": pa.string(), "keys": pa.binary(32)}
    schema = pa.schema(list(types.items()), metadata={**about, "classes": json.dumps(classes)})
    start = 0
    with parquet.ParquetWriter(stream, schema) as writer:
        for chunk in exported.chunks():
            part = slice(start, start := start + len(chunk))
            numbers = exported.labels[part].tolist()
            names = exported.label_names[part]
            columns: dict[str, Any] = {name: list(map(_escaped, t[part])) for name, t in exported.texts.items()}
            flat = pa.array(chunk.astype(np.float32).reshape(-1))
            columns |= {"features": pa.FixedSizeListArray.from_arrays(flat, width), "labels": numbers}
            columns |= {"label_names": [None if n is None else _escaped(n) for n in names], "keys": exported.keys[part]}
            writer.write_table(pa.table(columns, schema=schema))


def _escaped(text: str) -> str:
    return os.fsencode(text).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")

"""Export of a data set to one file with features, labels, paths, splits, groups, classes and keys.

h5        plain HDF5 with the layout of `_sealed`; h5py alone reads it
npy       one .npz of plain arrays, without pickle
parquet   one column per array; a byte that is not UTF-8 is written as \\xNN and a backslash is doubled, so every file name
          can be recovered

In h5 and npy, texts are bytes: file names keep their bytes, whatever their encoding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from embedpipe.cache._features import CHUNK_BYTES, Array, SpaceView, encode_texts, key_matrix
from embedpipe.cache._sealed import ArrayInfo, build_header, seal
from embedpipe.data import Manifest, Sample
from embedpipe.errors import UsageError
from embedpipe.provenance import canonical_json


class Exported:
    """The rows of a data set in one space, with paths, labels, splits and groups, in the order of `samples`.

    samples : n Sample, each with a row in the view
    chunk_bytes : int    features held in memory at a time, in h5 and parquet
    """

    def __init__(
        self, manifest: Manifest, samples: tuple[Sample, ...], view: SpaceView, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.view, self.keys, self._chunk_bytes = view, [sample.key for sample in samples], chunk_bytes
        self.task, self.labels = manifest.task, manifest.targets(samples)
        self.texts = {
            "paths": [manifest.display_name(sample) for sample in samples],
            "splits": [sample.split for sample in samples],
            "groups": [sample.group or "" for sample in samples],
        }
        self.classes = list(manifest.classes)
        self.label_names = [sample.label for sample in samples]

    @property
    def columns(self) -> dict[str, Array]:
        """All arrays except the features."""
        texts = {name: encode_texts(values) for name, values in {**self.texts, "classes": self.classes}.items()}
        return {**texts, "labels": self.labels, "keys": key_matrix(self.keys)}

    def chunks(self) -> Iterator[Array]:
        """Yield the features in chunks of rows."""
        return self.view.read_chunks(self.keys, self._chunk_bytes)


def export_writer(format: str, exported: Exported, about: dict[str, str]) -> Callable[[IO[bytes]], None]:
    """Return the function that writes a format to a stream.

    Parameters
    ----------
    about : dict    facts stored with the arrays, such as the spec of the space

    Raises
    ------
    UsageError    parquet without pyarrow
    """
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as exc:
            hint = "pip install 'embedpipe[parquet]', or use --format h5"
            raise UsageError("--format parquet needs pyarrow", hint=hint) from exc
    write = {"h5": _write_h5, "npy": _write_npz, "parquet": _write_parquet}[format]
    return lambda stream: write(stream, exported, about)


def _write_h5(stream: IO[bytes], exported: Exported, about: dict[str, str]) -> None:
    large = ArrayInfo("features", (len(exported.keys), exported.view.feature_dim), exported.view.dtype)
    stream.write(seal(build_header(exported.columns, about, large), large.nbytes))
    for chunk in exported.chunks():
        stream.write(chunk.tobytes())


def _write_npz(stream: IO[bytes], exported: Exported, about: dict[str, str]) -> None:
    facts = np.array(canonical_json(about).encode())
    arrays: dict[str, Any] = {"features": exported.view.read(exported.keys), "about": facts, **exported.columns}
    np.savez(stream, **arrays)


def _write_parquet(stream: IO[bytes], exported: Exported, about: dict[str, str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    classes = [_escape(name) for name in exported.classes]
    width = exported.view.feature_dim
    types = {"features": pa.list_(pa.float32(), width), **dict.fromkeys(exported.texts, pa.string())}
    label = {"single": pa.int64(), "multilabel": pa.list_(pa.float32()), "regression": pa.float64()}[exported.task]
    types |= {"labels": label, "label_names": pa.string(), "keys": pa.binary(32)}
    schema = pa.schema(list(types.items()), metadata={**about, "classes": json.dumps(classes)})
    start = 0
    with parquet.ParquetWriter(stream, schema) as writer:
        for chunk in exported.chunks():
            part = slice(start, start := start + len(chunk))
            flat = pa.array(chunk.astype(np.float32).reshape(-1))
            columns: dict[str, Any] = {name: list(map(_escape, t[part])) for name, t in exported.texts.items()}
            columns["features"] = pa.FixedSizeListArray.from_arrays(flat, width)
            columns["labels"] = exported.labels[part].tolist()
            columns["label_names"] = [None if n is None else _escape(n) for n in exported.label_names[part]]
            columns["keys"] = exported.keys[part]
            writer.write_table(pa.table(columns, schema=schema))


def _escape(text: str) -> str:
    return os.fsencode(text).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")

"""Several labels an image, or a number: every kind of table, what they are as numbers, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from embedpipe.data import ByteSource, Manifest, read_manifest
from embedpipe.errors import UsageError

NAMES = [["cat", "dog"], [], ["dog"], ["cat"]]
NUMBERS = [0.5, -3, 1e3, 7]


def key_of(place: ByteSource) -> bytes:
    return hashlib.sha256(f"{place.path} {place.part}".encode()).digest()


def read(*files: Path, **options: Any) -> Manifest:
    return read_manifest(files, key_of=key_of, **options)


def write(file: Path, column: str, values: list[Any]) -> Path:
    """Write a table of a path and a value a row, as its suffix says."""
    rows = [{"path": f"{n}.png", column: value} for n, value in enumerate(values)]
    if file.suffix == ".parquet":
        parquet.write_table(pa.table({name: [row[name] for row in rows] for name in ("path", column)}), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        tab = "\t" if file.suffix == ".tsv" else ","
        cells = ["|".join(value) if isinstance(value, list) else str(value) for value in values]
        file.write_text("\n".join([f"path{tab}{column}", *(f"{n}.png{tab}{cell}" for n, cell in enumerate(cells))]))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table(tmp_path: Path, suffix: str) -> None:
    several = read(write(tmp_path / f"several{suffix}", "labels", NAMES))
    assert (several.task, several.classes) == ("multilabel", ("cat", "dog"))
    y = several.targets(several.samples)
    assert (y.dtype, y.tolist()) == (np.float32, [[1, 1], [0, 0], [0, 1], [1, 0]])
    numbers = read(write(tmp_path / f"numbers{suffix}", "target", NUMBERS))
    assert (numbers.task, numbers.classes, numbers.labelled) == ("regression", ("target",), True)
    y = numbers.targets(numbers.samples)
    assert (y.dtype, y.tolist()) == (np.float64, NUMBERS)
    single = read(write(tmp_path / f"single{suffix}", "label", ["b", "a", "b", "c"]))
    assert (single.task, single.targets(single.samples).tolist()) == ("single", [1, 0, 1, 2])


def test_the_same_names_are_the_same_label(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,labels\na.png, dog | cat|dog\nb.png,cat|dog\nc.png,\n")
    assert [sample.label for sample in read(tmp_path / "x.csv").samples] == ["cat|dog", "cat|dog", "|"]


def test_lists_of_class_labels_in_parquet(tmp_path: Path) -> None:
    names = {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"labels": names}}})}
    table = pa.table({"image": [b"1", b"2"], "labels": [[1, 0], []]})
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    manifest = read(tmp_path / "x.parquet")
    assert [sample.label for sample in manifest.samples] == ["cat|dog", "|"]
    parquet.write_table(pa.table({"image": [b"1", b"2"], "target": [1.5, 2.0]}), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet").task == "regression"
    parquet.write_table(pa.table({"image": [b"1"], "class": ["a"], "target": [1.5]}), tmp_path / "z.parquet")
    with pytest.raises(UsageError, match="found the columns label and target, expected one"):
        read(tmp_path / "z.parquet")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "path,target\na.png,1\nb.png,many\n", "line 3: target 'many', expected a number of at most 1e\\+100"),
        ("x.csv", "path,target\na.png,nan\n", "line 2: target 'nan', expected a number of at most 1e\\+100"),
        ("x.csv", "path,target\na.png,1\nb.png,-1e200\n", "line 3: target '-1e200', expected a number of at most 1e\\+100"),
        ("x.csv", "path,target\na.png,1\nb.png,\n", "line 3: no label"),
        ("x.csv", "path,labels\na.png,1\nb.png\n", "line 3: no label"),
        ("x.csv", "path,label,target\na.png,x,1\n", "line 1: found the columns label and target, expected one"),
        ("x.csv", "path,targets\na.png,1\n", "did you mean 'target'"),
        ("x.jsonl", '{"path": "a", "target": true}', "line 1: target 'True', expected a number of at most 1e\\+100"),
        ("x.jsonl", '{"path": "a", "target": [1]}', r"line 1: target is \[1\], expected text or a number"),
        ("x.jsonl", '{"path": "a", "labels": ["x|y"]}', r"line 1: labels are \['x\|y'\], expected a list of names"),
        ("x.jsonl", '{"path": "a", "labels": [null]}', "expected a list of names"),
        ("x.jsonl", '{"path": "a", "labels": ["x"]}\n{"path": "b", "labels": null}', "line 2: no label"),
        ("x.jsonl", '{"path": "a", "label": "x"}\n{"path": "b", "target": 1}', "line 2: found target, though other rows"),
    ],
)  # fmt: skip
def test_the_row_at_fault_is_named(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=expected):
        read(tmp_path / name)


def test_sources_of_several_tasks_are_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / "x.csv", "labels", NAMES), write(tmp_path / "y.csv", "target", NUMBERS)]
    with pytest.raises(UsageError, match=r"x\.csv' has multilabel labels, '.*y\.csv' regression, expected one kind"):
        read(*files)


def test_splits_by_hash_cover_every_name_and_have_nothing_to_say_of_numbers(tmp_path: Path) -> None:
    names = [["rare"] if n in (3, 4) else ["common"] * (n % 2) for n in range(60)]
    several = read(write(tmp_path / "x.csv", "labels", names), val_fraction=0.2, test_fraction=0.2)
    for split in ("train", "val"):
        assert any("rare" in (sample.label or "") for sample in several.samples if sample.split == split)
    numbers = read(write(tmp_path / "y.csv", "target", list(range(60))), val_fraction=0.2, test_fraction=0.2)
    assert numbers.warnings == ()
    assert set(numbers.splits) == {"train", "val", "test"}

"""Parquet: tables of paths, tables of images, and what is neither."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from embedpipe.data import ByteSource, Manifest, read_manifest
from embedpipe.data._parquet import ColumnCache, read_parquet_row
from embedpipe.errors import StorageError, UsageError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def key_of(place: ByteSource) -> bytes:
    return hashlib.sha256(place.read()).digest()


def write(path: Path, /, *, rows: int = 1000, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata) if metadata else table, path, row_group_size=rows)
    return path


def read(*data: Path, **options: Any) -> Manifest:
    return read_manifest(data, key_of=key_of, **options)


def test_a_table_of_paths(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"x/{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"x/{name}.png").write_bytes(name.encode())
    file = write(tmp_path / "list.parquet", path=["x/a.png", "x/b.png"], label=[1, 2], Split=["train", "valid"])
    manifest = read(file, split_by="column")
    assert [(s.path, s.label, s.split, s.part) for s in manifest.samples] == [
        ("x/a.png", "1", "train", ""),
        ("x/b.png", "2", "val", ""),
    ]
    for columns, message in (
        ({"path": ["../a.png"]}, r"bad.parquet, row 0: '../a.png' leaves the folder"),
        ({"path": ["a.png"], "lable": [1]}, "did you mean 'label'"),
        ({"path": ["a.png", "b.png"], "split": ["train", "nope"]}, "row 1: found the split 'nope'"),
        ({"file": ["a.png"]}, "expected path"),
    ):
        with pytest.raises(UsageError, match=message):
            read(write(tmp_path / "bad.parquet", **columns))


@pytest.mark.parametrize("rows", [3, 1000])
def test_images_in_rows(tmp_path: Path, rows: int) -> None:
    data = [b"%d" % n for n in range(10)]
    cells = pa.array([{"bytes": one, "path": f"sub/{n}.jpg"} for n, one in enumerate(data)], STRUCT)
    names = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})
    file = write(tmp_path / "x.parquet", rows=rows, metadata={"huggingface": names}, image=cells, label=[0, 1] * 5)
    manifest = read(file)
    assert [manifest.byte_source_of(s).read() for s in manifest.samples] == data
    assert not any(manifest.byte_source_of(s).is_local_range for s in manifest.samples)
    assert [s.label for s in manifest.samples] == ["cat", "dog"] * 5
    assert manifest.display_name(manifest.samples[4]) == f"{file}/4.jpg"
    assert manifest.samples[4].part == f"row {4 // rows}:{4 % rows} image/4.jpg"
    plain = read(write(tmp_path / "y.parquet", rows=rows, bytes=data, **{"class": ["a", "b"] * 5}, group=["g"] * 10))
    assert [plain.byte_source_of(s).read() for s in plain.samples] == data
    assert {(s.label, s.group) for s in plain.samples} == {("a", "g"), ("b", "g")}


def test_rows_without_bytes_are_unreadable(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": b"1", "path": None}, {"bytes": None, "path": "/etc/passwd"}, None], STRUCT)
    manifest = read(write(tmp_path / "x.parquet", img=cells))
    assert len(manifest.samples) == 1
    assert [f.reason for f in manifest.unreadable] == ["no bytes in this row"] * 2
    assert manifest.unreadable[0].path == f"{tmp_path}/x.parquet/passwd"


def test_a_label_that_has_no_name(tmp_path: Path) -> None:
    names = json.dumps({"info": {"features": {"label": {"names": ["cat"]}}}})
    with pytest.raises(UsageError, match="found the label '1', expected 0 to 0"):
        read(write(tmp_path / "x.parquet", metadata={"huggingface": names}, image=[b"1", b"2"], label=[0, 1]))
    with pytest.raises(UsageError, match="no image in"):
        read(write(tmp_path / "x.parquet", image=pa.array([], pa.binary())))


def test_a_folder_of_parquet_files_has_the_splits_of_their_names(tmp_path: Path) -> None:
    for n, name in enumerate(("train-0", "train-1", "validation-0")):
        write(tmp_path / f"data/{name}.parquet", image=[b"%d" % n, b"%d" % (n + 10)], label=["a", "b"])
    assert read(tmp_path).splits == {"train": 4, "val": 2}
    assert set(read(tmp_path, split_by="hash").splits) <= {"train", "val", "test"}


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    place = ByteSource(str(write(tmp_path / "x.parquet", image=[b"old"])), "row 0:0 image")
    assert place.read() == b"old"
    write(tmp_path / "x.parquet", image=[b"new"])
    assert place.read() == b"new"


def test_row_groups_in_memory_are_bounded(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", rows=1, image=[bytes([n]) * 1000 for n in range(10)])
    columns = ColumnCache(max_bytes=2500)
    for n in (*range(10), 9, 8):
        data = read_parquet_row(str(file), "1", f"row {n}:0 image", columns)
        assert data == bytes([n]) * 1000
        assert sum(columns.sizes().values()) <= 2500 or len(columns.sizes()) == 1
    assert [group for _, group, _ in columns.sizes()] == [9, 8]


def test_what_is_no_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"garbage")
    with pytest.raises(StorageError, match=r"could not read '.*x\.parquet': not Parquet"):
        read(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"need pyarrow; pip install 'embedpipe\[parquet\]'"):
        read(tmp_path / "x.parquet")

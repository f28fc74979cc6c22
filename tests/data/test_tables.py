"""CSV, TSV and JSONL tables: encodings, quoting, columns, paths, and the line that is at fault."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from embedpipe.data import ByteSource, Manifest, read_manifest
from embedpipe.errors import UsageError


def key_of(place: ByteSource) -> bytes:
    return hashlib.sha256(os.fsencode(os.path.basename(place.path))).digest()  # the files need not exist


def read(folder: Path, text: str | bytes, name: str = "list.csv", **options: object) -> Manifest:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest([folder / name], key_of=key_of, **options)


def refused(folder: Path, text: str | bytes, name: str = "list.csv") -> str:
    with pytest.raises(UsageError) as caught:
        read(folder, text, name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


FULL = "path,label,split,group\nx/b.png,dog,train,p1\nx/a.png,cat,val,\nx/c.png,cat,Test,p2\n"


def test_all_columns_in_the_order_of_the_file(tmp_path: Path) -> None:
    manifest = read(tmp_path, FULL)
    assert [(s.path, s.label, s.split, s.group) for s in manifest.samples] == [
        ("x/b.png", "dog", "train", "p1"),
        ("x/a.png", "cat", "val", None),
        ("x/c.png", "cat", "test", "p2"),
    ]
    assert manifest.classes == ("cat", "dog")
    assert manifest.name == "list"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "\ufeff" + FULL),
        ("list.csv", FULL.replace("\n", "\r\n")),
        ("list.csv", FULL.replace(",", ";")),
        ("list.csv", FULL.replace("path,label", '"Path", LABEL ')),
        ("list.csv", FULL + "\n\n,,,\n"),
        ("list.CSV", FULL.encode("utf-16")),
        ("list.tsv", FULL.replace(",", "\t")),
        ("list.csv", FULL.replace("\n", ",extra\n")),
    ],
)
def test_the_same_table_written_otherwise(tmp_path: Path, name: str, text: str | bytes) -> None:
    (tmp_path / "other").mkdir()
    assert read(tmp_path, text, name).samples == read(tmp_path / "other", FULL).samples


def test_json_lines_are_the_same_table(tmp_path: Path) -> None:
    columns, *rows = (line.split(",") for line in FULL.splitlines())
    records = [{k: v or None for k, v in zip(columns, row, strict=True)} for row in rows]
    text = "\n".join(map(json.dumps, records)) + "\n\n"
    assert read(tmp_path, text, "list.jsonl").samples == read(tmp_path, FULL).samples


def test_numbers_as_labels(tmp_path: Path) -> None:
    text = '{"path": "a.png", "label": 3}\n{"path": "b.png", "label": 10}'
    assert read(tmp_path, text, "list.jsonl").classes == ("10", "3")


def test_quoting(tmp_path: Path) -> None:
    text = 'path,label\n"a,b ""c"".png",cat\n"line\nbreak.png",dog\n'
    assert [s.path for s in read(tmp_path, text).samples] == ['a,b "c".png', "line\nbreak.png"]


def test_bytes_that_are_no_utf8_name_the_file_of_those_bytes(tmp_path: Path) -> None:
    manifest = read(tmp_path, b"path,label\ncaf\xe9.png,th\xe9\nb.png,b\n")
    assert os.fsencode(manifest.byte_source_of(manifest.samples[0]).path).endswith(b"/caf\xe9.png")
    assert os.fsencode(manifest.samples[0].label) == b"th\xe9"


def test_display_name_and_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    read(tmp_path / "sub", "path\nx/a.png\n")
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(["sub/list.csv"], key_of=key_of)
    assert manifest.display_name(manifest.samples[0]) == "sub/x/a.png"
    assert manifest.byte_source_of(manifest.samples[0]) == ByteSource.from_path(tmp_path / "sub/x/a.png")
    assert manifest.splits == {"all": 1}


def test_a_near_miss_of_a_column_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "path,lable\na.png,cat\n")
    assert "'lable'" in message
    assert "did you mean 'label'" in message
    assert "'spilt'" in refused(tmp_path, '{"path": "a.png", "spilt": "val"}', "list.jsonl")


def test_other_columns_pass(tmp_path: Path) -> None:
    text = "id,path,patch,label,width\n1,a.png,x,cat,3\n2,b.png,y,dog,4\n"
    assert read(tmp_path, text).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "(none)"),
        ("file,label\na.png,cat\n", "found the columns file, label"),
        ("path,label,label\na.png,cat,dog\n", "each once"),
        ("path,label\na.png,cat\nb.png,\nc.png,dog\n", "list.csv, line 3: no label"),
        ("path,label,split\na.png,cat,train\nb.png,dog,\n", "line 3: no split"),
        ("path,split\na.png,tran\n", "line 2: found the split 'tran'"),
        ("path,label\n,cat\n", "line 2: no path"),
        ("path,label\na,b.png,cat\n", "line 2: found 3 values, expected 2"),
        ('path,label\n"a.png,cat\n', "unexpected end of data"),
        ("path,label\na\0.png,cat\n", "line 2: 'a\\x00.png' holds characters"),
        ("path\n", "no image in"),
    ],
)
def test_the_line_at_fault_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"path": "a.png"}\nnonsense', "line 2: not JSON"),
        ('["a.png"]', "expected a JSON object"),
        ('{"path": ["a.png"]}', "expected text or a number"),
        ('{"label": "cat"}', "found the columns label"),
        ('{"path": "\\ud800.png"}', "holds characters"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_the_json_line_at_fault_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text, "list.jsonl")


@pytest.mark.parametrize("path", ["../a.png", "x/../../a.png", "/etc/a.png"])
def test_paths_outside_need_leave(tmp_path: Path, path: str) -> None:
    text = f"path\n{path}\n"
    assert "leaves the folder" in refused(tmp_path, text)
    manifest = read(tmp_path, text, allow_outside=True)
    assert os.path.normpath(manifest.byte_source_of(manifest.samples[0]).path) == os.path.normpath(tmp_path / path)


def test_a_sibling_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    assert "leaves the folder" in refused(tmp_path, f"path\n../{tmp_path.name}-2/a.png\n")


def test_a_link_that_leaves_the_folder_is_outside(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "x").mkdir(parents=True)
    (data / "inner").symlink_to("x")
    (data / "out").symlink_to(tmp_path)
    (data / "out.png").symlink_to("../a.png")
    for path in ("out/a.png", "out.png", "out/data/out/a.png"):
        assert "through a link" in refused(data, f"path\n{path}\n")
        assert len(read(data, f"path\n{path}\n", allow_outside=True).samples) == 1
    assert [s.path for s in read(data, "path\ninner/a.png\n").samples] == ["inner/a.png"]


def test_inside_paths_are_normalised(tmp_path: Path) -> None:
    text = f"path\nx/../a.png\n{tmp_path}/y/b.png\n./c.png\n..d/e.png\n"
    assert [s.path for s in read(tmp_path, text).samples] == ["a.png", "y/b.png", "c.png", "..d/e.png"]


def test_missing_files_are_unreadable_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("path\na.png\nb.png\n")
    manifest = read_manifest([tmp_path / "list.csv"], key_of=lambda p: p.read() * 32)
    assert [f.path for f in manifest.unreadable] == [f"{tmp_path}/b.png"]


def test_split_by_column_and_hash(tmp_path: Path) -> None:
    assert read(tmp_path, FULL, split_by="column").splits == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(UsageError, match="no splits by folder"):
        read(tmp_path, FULL, split_by="folder")
    rows = "".join(f"{i}.png,{'ab'[i % 2]},train\n" for i in range(80))
    assert "test" in read(tmp_path, "path,label,split\n" + rows, split_by="hash").splits


def test_an_image_with_two_labels_is_told(tmp_path: Path) -> None:
    text = "path,label\na/x.png,cat\nb/x.png,cat\na/y.png,cat\na/y.png,dog\na/z.png,dog\n"
    [warning] = [one for one in read(tmp_path, text).warnings if "several labels" in one]
    assert warning == "1 image(s) with several labels, the first: a/y.png, cat and dog"
    assert not [one for one in read(tmp_path, FULL).warnings if "several labels" in one]

"""URLs: a real web server with ranges, and the file system in memory."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from embedpipe.cache import Cache, KeyIndex
from embedpipe.data import ByteSource, Manifest, _files, read_manifest
from embedpipe.errors import StorageError, UsageError
from tests.data.serving import serving
from tests.data.test_tar import write as write_tar


def read(index: KeyIndex, *data: str, **options: object) -> Manifest:
    return read_manifest(data, key_of=index.key_of, **options)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[KeyIndex]:
    index = KeyIndex(tmp_path / "memo.sqlite")
    yield index
    index.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders, a table, and two tars, of files that are no images but have their names."""
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "web/data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web/data" / name).write_bytes(name.encode() * 100)
    (tmp_path / "web/data/list.csv").write_text("path,label\na/1.png,x\nb/3.png,y\n")
    for number in range(2):
        write_tar(tmp_path / f"web/s-{number}.tar", (f"{'ab'[number]}/{number}.png", b"%d" % number * 900))
    return tmp_path / "web"


def test_folders_tables_and_tars_of_the_web(folder: Path, index: KeyIndex) -> None:
    with serving(folder) as (url, asked):
        manifest = read(index, f"{url}/data/")
        assert [(s.path, s.label) for s in manifest.samples] == [("a/1.png", "a"), ("a/2.png", "a"), ("b/3.png", "b")]
        assert [s.key for s in manifest.samples[:1]] == [hashlib.sha256(b"a/1.png" * 100).digest()]
        assert manifest.display_name(manifest.samples[0]) == f"{url}/data/a/1.png"
        assert [s.label for s in read(index, f"{url}/data/list.csv").samples] == ["x", "y"]
        tars = read(index, f"{url}/s-{{0..1}}.tar")
        assert [tars.display_name(s) for s in tars.samples] == [f"{url}/s-0.tar/a/0.png", f"{url}/s-1.tar/b/1.png"]
        asked.clear()
        assert tars.byte_source_of(tars.samples[1]).read() == b"1" * 900
        assert [body for method, _, body in asked if method == "GET"] == [b"1" * 900]  # the range, nothing else


def test_a_data_set_comes_back_from_its_table(folder: Path, index: KeyIndex, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with serving(folder) as (url, _):
        for argument in (f"{url}/data/", f"{url}/s-{{0..1}}.tar", f"{url}/data/list.csv"):
            manifest = read(index, argument)
            assert cache.read_dataset(cache.write_dataset(manifest)) == manifest
            assert cache.read_dataset(argument) == manifest
    assert len(cache.datasets()) == 3


@pytest.mark.parametrize(("etags", "expected"), [(True, 0), (False, 3)])
def test_keys_are_remembered_where_the_server_tells_versions(
    folder: Path, tmp_path: Path, etags: bool, expected: int
) -> None:
    with serving(folder, etags=etags) as (url, _):
        for hashed in (3, expected):
            index = KeyIndex(tmp_path / "memo.sqlite")
            first = read(index, f"{url}/data")
            assert index.hashed == hashed
            index.close()
        (folder / "data/a/1.png").write_bytes(b"new")
        _files._look_up_version.cache_clear()  # as after two seconds
        index = KeyIndex(tmp_path / "memo.sqlite")
        second = read(index, f"{url}/data")
        index.close()
    assert [one.key == two.key for one, two in zip(first.samples, second.samples, strict=True)] == [False, True, True]


def test_a_version_needs_a_checksum_or_an_old_time() -> None:
    now = time.time()
    assert _files._version_of({"size": 1, "etag": "x", "mtime": now}) == "1 etag=x"
    assert _files._version_of({"size": 1, "mtime": now - 60}) is not None
    assert _files._version_of({"size": 1, "mtime": now}) is None
    assert _files._version_of({"size": 1, "name": "x"}) is None
    assert _files._version_of({"size": None, "etag": "x"}) is None


def test_what_is_not_there_is_told_in_a_line(folder: Path, index: KeyIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder) as (url, _):
        with pytest.raises(StorageError, match=r"could not read 'http.*none\.csv': no such file"):
            read(index, f"{url}/none.csv")
        with pytest.raises(UsageError, match=r"no image in '.*none\.tar' \(no such file"):
            read(index, f"{url}/none.tar")
        (folder / "data/list.csv").write_text("path\na/1.png\nnone.png\n")
        manifest = read(index, f"{url}/data/list.csv")
        assert [(f.path, f.reason) for f in manifest.unreadable] == [(f"{url}/data/none.png", "no such file")]
    with pytest.raises(StorageError, match="could not read 'http"):
        read(index, "http://127.0.0.1:1/list.csv")  # nobody listens
    with pytest.raises(UsageError, match="nope"):
        read(index, "nope://bucket/data")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match="s3fs"):
        read(index, "s3://bucket/data")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match=r"needs fsspec; pip install 'embedpipe\[remote\]'"):
        read(index, "s3://bucket/data")


def test_tables_stay_below_their_url(folder: Path, index: KeyIndex, tmp_path: Path) -> None:
    with serving(folder) as (url, _):
        for path in ("../s-0.tar", "/etc/passwd", "x/../../y.png", f"{url}/data/a/1.png"):
            (folder / "data/out.csv").write_text(f"path\n{path}\n")
            with pytest.raises(UsageError, match="leaves the folder of the table"):
                read(index, f"{url}/data/out.csv")
        (tmp_path / "here.csv").write_text(f"path\n{url}/data/a/1.png\n")
        with pytest.raises(UsageError, match="leaves the folder of the table"):
            read(index, str(tmp_path / "here.csv"))
        manifest = read(index, str(tmp_path / "here.csv"), allow_outside=True)
        assert manifest.byte_source_of(manifest.samples[0]) == ByteSource(f"{url}/data/a/1.png")


class Versioned(MemoryFileSystem):
    """A file system whose `cat_file` takes a version before a range, as that of s3fs does."""

    protocol = "versioned"

    def cat_file(self, path: str, version_id: None = None, start: int | None = None, end: int | None = None) -> bytes:
        assert version_id is None
        return bytes(super().cat_file(path, start=start, end=end))


def test_ranges_are_asked_for_by_name() -> None:
    fsspec.register_implementation("versioned", Versioned, clobber=True)
    Versioned().pipe("versioned://x/y", b"abcdef")
    assert ByteSource("versioned://x/y", "2+3").read() == b"cde"


def test_files_by_url_and_in_memory(folder: Path, index: KeyIndex) -> None:
    here = read(index, f"file://{folder}/data")
    assert all(here.byte_source_of(s).is_local_range for s in here.samples)
    system = fsspec.filesystem("memory")
    system.pipe({"/test/x/1.png": b"one", "/test/x/.2.png": b"two", "/test/note.txt": b""})
    manifest = read(index, "memory://test")
    assert [(s.path, s.label) for s in manifest.samples] == [("x/1.png", "x")]
    assert manifest.ignored == 1
    system.pipe("/x.csv", b"path\ntest/x/1.png\n")
    assert read(index, "memory://x.csv").samples[0].key == hashlib.sha256(b"one").digest()

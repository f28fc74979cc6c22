"""The memo of hashes is right when files change, and errors of SQLite are ignored."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path

import pytest

from embedpipe.cache import KeyIndex
from embedpipe.data import ByteSource


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def open_index(path: Path) -> KeyIndex:
    """Open a memo that remembers files however recently they changed."""
    return KeyIndex(path, racy_ns=-(10**12))


def test_known_files_are_not_read_again(tmp_path: Path) -> None:
    image = write_file(tmp_path / "a.jpg", b"abc")
    odd = write_file(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.jpg")), b"odd")
    for expected in (2, 0):
        index = open_index(tmp_path / "memo" / "index.sqlite")
        assert index.key_of(image) == hashlib.sha256(b"abc").digest()
        assert index.key_of(odd) == hashlib.sha256(b"odd").digest()
        assert index.hashed == expected
        index.close()


def test_parts_of_a_file_are_remembered_apart_and_forgotten_together(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.tar", b"abcdef")
    parts = {"0+3": b"abc", "3+3": b"def", "": b"abcdef"}
    for expected in (3, 0):
        index = open_index(tmp_path / "index.sqlite")
        for part, data in parts.items():
            assert index.key_of(ByteSource(str(file), part)) == hashlib.sha256(data).digest()
        assert index.hashed == expected
        index.close()
    file.write_bytes(b"ABCDEF")
    index = open_index(tmp_path / "index.sqlite")
    assert index.key_of(ByteSource(str(file), "3+3")) == hashlib.sha256(b"DEF").digest()
    index.close()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    image = write_file(tmp_path / "a.jpg", b"abc")
    index = open_index(tmp_path / "index.sqlite")
    index.key_of(image)
    index.close()
    status = image.stat()
    image.write_bytes(b"xyz")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    index = open_index(tmp_path / "index.sqlite")
    assert index.key_of(image) == hashlib.sha256(b"xyz").digest()
    index.close()


def test_recently_changed_files_are_not_remembered(tmp_path: Path) -> None:
    image = write_file(tmp_path / "a.jpg", b"abc")
    for _ in range(2):
        index = KeyIndex(tmp_path / "index.sqlite")
        index.key_of(image)
        assert index.hashed == 1
        index.close()


def test_a_corrupt_memo_is_replaced(tmp_path: Path) -> None:
    image, path = write_file(tmp_path / "a.jpg", b"abc"), tmp_path / "index.sqlite"
    path.write_bytes(b"no database" * 1000)
    for expected in (1, 0):
        index = open_index(path)
        assert index.key_of(image) == hashlib.sha256(b"abc").digest()
        assert index.hashed == expected
        index.close()


def test_a_locked_memo_is_not_waited_for(tmp_path: Path) -> None:
    image, path = write_file(tmp_path / "a.jpg", b"abc"), tmp_path / "index.sqlite"
    index = open_index(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert index.key_of(image) == hashlib.sha256(b"abc").digest()
    index.close()
    late = open_index(path)
    assert late.key_of(image) == hashlib.sha256(b"abc").digest()
    late.close()
    other.close()


def test_a_memo_that_cannot_be_written_still_hashes(tmp_path: Path) -> None:
    image = write_file(tmp_path / "a.jpg", b"abc")
    index = open_index(image / "index.sqlite")
    assert index.key_of(image) == hashlib.sha256(b"abc").digest()
    index.close()


def test_files_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    index = open_index(tmp_path / "index.sqlite")
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "absent.jpg", tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(OSError, match=r"."):
            index.key_of(path)
    index.close()

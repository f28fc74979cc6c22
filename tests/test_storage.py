"""Atomic writes, free space and amounts with units."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedpipe.errors import StorageError, UsageError
from embedpipe.storage import BYTES, atomic_folder, check_free_space, format_size, parse_amount, write_atomic


def test_files_are_written_atomically(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep" / "a.txt", b"one")
    write_atomic(tmp_path / "deep" / "a.txt", b"two")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        write_atomic(tmp_path / "folder", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_too_little_free_space_is_an_error(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match=r"are free in .*1000000000.0 GB are needed"):
        check_free_space(tmp_path / "not" / "yet", 10**18)


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"w")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "model" / "weights").read_bytes() == b"w"
    assert {str(folder), str(folder / "model"), str(folder / "model" / "weights")} <= set(synced[:-1])
    assert synced[-1] == str(tmp_path)

    def fail() -> None:
        with atomic_folder(tmp_path / "other") as folder:
            (folder / "a").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_amounts_are_formatted_and_parsed() -> None:
    assert [format_size(count) for count in (999, 1500, 2_000_000, 3_200_000_000)] == [
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "3.2 GB",
    ]
    assert [parse_amount(text, BYTES, "--x", "10GB") for text in ("10GB", " 1.5 kib ", 7)] == [10**10, 1536, 7]
    for text in ("lots", "10 XB", "-1", ""):
        with pytest.raises(UsageError, match=r"--x: got .*expected a number and a unit such as 10GB"):
            parse_amount(text, BYTES, "--x", "10GB")

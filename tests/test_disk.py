"""Files written whole, and plans that the disk cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedpipe.disk import check_free_space, publish
from embedpipe.errors import StorageError


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    publish(tmp_path / "deep" / "a.txt", b"one")
    publish(tmp_path / "deep" / "a.txt", b"two")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        publish(tmp_path / "folder", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match=r"are free in .*1000000000.0 GB are needed"):
        check_free_space(tmp_path / "not" / "yet", 10**18)

"""Size and last use of spaces, and their removal: completely or not at all."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from embedpipe.cache import Cache, Space, last_used, measure, sweep_leftovers
from embedpipe.errors import CacheBusy, StorageError

from .conftest import SPEC, forked, kill_self, rows, write

KEYS, X = rows(30)


def test_measured_as_the_file_system_says(space: Space) -> None:
    write(space, KEYS, X)
    paths = [path for path in space.folder.rglob("*") if path.is_file()]
    assert measure(space.folder) == sum(path.stat().st_size for path in paths) > X.nbytes
    assert measure(paths[0]) == paths[0].stat().st_size
    assert measure(space.folder / "absent") == 0


def test_use_is_recorded_where_that_can_be(space: Space) -> None:
    space.mark_used()  # nothing there: no error
    write(space, KEYS, X)
    os.utime(space.folder / "meta.json", (1, 1))
    assert last_used(space.folder) == 1
    space.mark_used()
    assert last_used(space.folder) > time.time() - 60


def test_a_removed_space_is_gone_and_can_be_made_again(cache: Cache, space: Space) -> None:
    write(space, KEYS, X)
    view = space.view()
    cache.remove_space(space.folder.name, dry_run=True)
    assert len(space.view()) == 30
    cache.remove_space(space.folder.name)
    assert (cache.spaces(), list(cache.spaces_folder.iterdir())) == ([], [])
    assert (view.read(KEYS) == X).all()  # who has it open goes on reading
    write(space, KEYS, X)
    assert len(space.view()) == 30


def test_a_space_that_is_being_written_stays(cache: Cache, space: Space) -> None:
    with space.writer(feature_dim=8, dtype="float32", environment={}, pins={}) as writer:
        writer.append(KEYS, X)
        for dry_run in (True, False):
            with pytest.raises(CacheBusy, match=f"process {os.getpid()} on "):
                cache.remove_space(space.folder.name, dry_run=dry_run)
        writer.finish()
    assert len(space.view()) == 30


def test_a_space_whose_lock_excludes_nobody_stays(cache: Cache, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    write(space, KEYS, X)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as some network file systems answer
    with pytest.raises(StorageError, match="exclude nobody"):
        cache.remove_space(space.folder.name)
    assert len(space.view()) == 30


def test_killed_while_removing_leaves_no_space(cache: Cache, space: Space) -> None:
    write(space, KEYS, X)

    def body() -> None:
        import shutil

        shutil.rmtree = lambda *_, **__: kill_self()  # type: ignore[assignment]
        cache.remove_space(space.folder.name)

    assert forked(body) == -9
    assert (cache.space_names(), cache.spaces()) == ([], [])
    (left,) = cache.spaces_folder.iterdir()
    assert sweep_leftovers(cache.root, dry_run=False) == {}
    os.utime(left, (1, 1))
    held = measure(left)
    assert sweep_leftovers(cache.root, dry_run=True) == {left.name: held}
    assert sweep_leftovers(cache.root, dry_run=False) == {left.name: held}
    assert list(cache.spaces_folder.iterdir()) == []


def test_an_attempt_that_committed_nothing_is_no_space(cache: Cache, tmp_path: Path) -> None:
    (cache.open_space(SPEC).folder / "shards").mkdir(parents=True)
    assert cache.space_names() == []

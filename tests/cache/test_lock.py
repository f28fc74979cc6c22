"""One writer at a time, named in the error; where locks exclude nobody, writers only add."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from embedpipe.cache import Space
from embedpipe.errors import CacheBusy

from .conftest import forked, rows, write

OPTIONS = {"feature_dim": 8, "dtype": "float32", "environment": {}, "pins": {}}


def hold(space: Space, ready: Any) -> None:
    with space.writer(**OPTIONS):  # type: ignore[arg-type]
        ready.set()
        time.sleep(60)


def test_the_second_writer_is_told_who_holds_the_space(space: Space) -> None:
    spawned = multiprocessing.get_context("spawn")
    ready = spawned.Event()
    holder = spawned.Process(target=hold, args=(space, ready))
    holder.start()
    assert ready.wait(30)
    started = time.monotonic()
    with pytest.raises(CacheBusy, match=f"process {holder.pid} on "):
        write(space, *rows(1))
    assert time.monotonic() - started < 1
    assert len(space.view()) == 0
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    write(space, *rows(1))
    assert len(space.view()) == 1


def test_one_of_many_proceeds(space: Space) -> None:
    """All begin when `go` is closed; the one that got in stays until the others have ended."""
    (start, go), (stay, leave) = os.pipe(), os.pipe()

    def body() -> None:
        os.read(start, 1)
        with space.writer(**OPTIONS):  # type: ignore[arg-type]
            os.read(stay, 1)

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.close(leave)
            os._exit(forked(body))
        children.append(child)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in children[1:]]
    os.close(leave)
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    os.close(start)
    os.close(stay)
    assert codes == [75, 75, 75, 0]


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def agree(*_: Any) -> None:
    """A file system where every taker gets the lock."""


@pytest.mark.parametrize("flock", [refuse, agree])
def test_without_an_exclusive_lock_writers_only_add(space: Space, monkeypatch: pytest.MonkeyPatch, flock: Any) -> None:
    keys, X = rows(10)
    write(space, keys[:2], X[:2])
    base = space.features_path.read_bytes()
    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        space.writer(**OPTIONS) as one,  # type: ignore[arg-type]
        space.writer(**OPTIONS) as two,  # type: ignore[arg-type]
    ):
        ((space.folder / "shards") / ".tmp-of-the-other").touch()
        one.append(keys[2:6], X[2:6])
        two.append(keys[4:], X[4:])
        one.finish()
        two.finish()
    assert ((space.folder / "shards") / ".tmp-of-the-other").exists()
    assert (space.pending_shards, space.features_path.read_bytes()) == (2, base)
    assert (space.view().read(keys) == X).all()
    monkeypatch.undo()
    write(space, [], X[:0])
    assert not list((space.folder / "shards").iterdir())
    assert (space.view().read(keys) == X).all()


def test_the_lock_is_free_after_a_writer_that_failed_to_enter(space: Space) -> None:
    write(space, *rows(1))
    meta = Path(space.folder / "meta.json")
    kept = meta.read_bytes()
    meta.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match="damaged"):
        write(space, *rows(1))
    meta.write_bytes(kept)
    write(space, *rows(2))
    assert len(space.view()) == 2

"""Readers loop through writing and merging: no error, no row lost from sight, no row of another key."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

import pytest

from embedpipe.cache import Space

from ._proving import OPTIONS, features_of, fork, keys_of, open_space, wait
from ._tier import tier

ROUNDS = tier(12, 150)
SHARDS = tier(8, 30)
ROWS = 5
READERS = 2


def write_rounds(space: Space, committed: Path) -> None:
    """Commit shard after shard and merge them, again and again; note how many rows are committed."""
    count = 0
    for _ in range(ROUNDS):
        with space.writer(**OPTIONS) as writer:
            for _ in range(SHARDS):
                keys = keys_of(range(count, count + ROWS))
                writer.append(keys, features_of(keys))
                writer.commit()
                count += ROWS
                os.pwrite(descriptor_of(committed), b"%012d" % count, 0)
            writer.append(keys_of([0]), features_of(keys_of([0])))  # one twice, as two writers may
            writer.finish()


@cache
def descriptor_of(path: Path) -> int:
    """Open a file once a process."""
    return os.open(path, os.O_RDWR | os.O_CREAT)


def read_rounds(space: Space, committed: Path, over: int) -> None:
    """Look until told to stop; an old view is kept and read again after what it showed has been merged."""
    most, looks, old, descriptor = 0, 0, space.view(), descriptor_of(committed)
    os.set_blocking(over, False)
    while not is_over(over) or looks < 5:
        safe = int(os.pread(descriptor, 12, 0) or 0)
        view = space.view()
        assert len(view) >= max(most, safe), f"{len(view)} rows, {most} were there before, {safe} are committed"
        most, looks = len(view), looks + 1
        for one in (view, old):
            keys = [key.tobytes() for key in one.keys]
            assert not keys or (one.read(keys) == features_of(keys)).all()
        if looks % 7 == 0:
            old = view
    assert most == ROUNDS * SHARDS * ROWS
    print(f"{looks} looks")


def is_over(descriptor: int) -> bool:
    try:
        return os.read(descriptor, 1) == b""
    except BlockingIOError:
        return False


@pytest.mark.timeout(1200)
def test_readers_see_every_row_through_writing_and_merging(tmp_path: Path) -> None:
    space, committed = open_space(tmp_path), tmp_path / "committed"
    committed.write_bytes(b"%012d" % 0)
    over, running = os.pipe()

    def read() -> None:
        os.close(running)
        read_rounds(space, committed, over)

    started = time.monotonic()
    readers = [fork(read) for _ in range(READERS)]
    try:
        assert wait(fork(lambda: write_rounds(space, committed))) == 0
    finally:
        os.close(running)
        codes = [wait(reader) for reader in readers]
        os.close(over)
    assert codes == [0] * READERS
    assert space.pending_shards == 0
    print(f"{ROUNDS} merges in {time.monotonic() - started:.1f} s")

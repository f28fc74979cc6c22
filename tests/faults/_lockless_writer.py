"""The writers of test_locks.py, started with a flock that does not lock: `_lockless_writer.py ROOT one|two`.

Both begin at one moment. One then stops in the middle of a file under a temporary name, until two, which sweeps
and merges if it dares to, has left, come again and gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from embedpipe.cache import Space, SpaceWriter
from embedpipe.storage import write_atomic
from tests.faults._proving import OPTIONS, features_of, keys_of, open_space


def wait_for(sign: Path) -> None:
    deadline = time.monotonic() + 20
    while not sign.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(sign)
        time.sleep(0.002)


def commit_each(writer: SpaceWriter, numbers: Iterable[int]) -> None:
    for key in keys_of(numbers):
        writer.append([key], features_of([key]))
        writer.commit()


def write_one(space: Space, root: Path) -> None:
    def half(stream: IO[bytes]) -> None:
        stream.write(b"first half")
        stream.flush()
        (root / "one.writes").touch()
        wait_for(root / "two.finished")
        stream.write(b", second half")

    with space.writer(**OPTIONS) as writer:
        commit_each(writer, range(5, 15))
        write_atomic(space.folder / "shards/one.txt", half)
        commit_each(writer, range(15, 25))
        writer.finish()


def write_two(space: Space, root: Path) -> None:
    with space.writer(**OPTIONS) as writer:
        commit_each(writer, range(10, 20))
        writer.finish()
    wait_for(root / "one.writes")
    with space.writer(**OPTIONS) as writer:
        commit_each(writer, range(20, 40))
        writer.finish()
    (root / "two.finished").touch()


if __name__ == "__main__":
    place, name = Path(sys.argv[1]), sys.argv[2]
    (place / f"{name}.ready").touch()
    for each in ("one", "two"):
        wait_for(place / f"{each}.ready")
    {"one": write_one, "two": write_two}[name](open_space(place / "cache"), place)

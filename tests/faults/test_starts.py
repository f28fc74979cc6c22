"""Many starts at one moment: one proceeds, the others leave within a second, naming it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from embedpipe.cache import Space
from embedpipe.errors import CacheBusy
from tests.conftest import TINY, write_photos

from ._proving import OPTIONS, features_of, fork, keys_of, open_space, read_all, wait
from ._tier import tier

STARTS = tier(12, 200)
KEYS = keys_of(range(4))


def compete(space: Space, me: int, start: int, stop: int, report: int) -> None:
    """Wait for the start, try to write, and tell how it went; who got in stays until the others are done."""
    os.read(start, 1)
    begun = time.monotonic()
    try:
        with space.writer(**OPTIONS) as writer:
            told = {"pid": os.getpid(), "proceeds": True}
            os.write(report, (json.dumps(told) + "\n").encode())
            os.read(stop, 1)
            writer.append([KEYS[me]], features_of([KEYS[me]]))
            writer.finish()
    except CacheBusy as exc:
        told = {"pid": os.getpid(), "proceeds": False, "said": str(exc), "seconds": time.monotonic() - begun}
        os.write(report, (json.dumps(told) + "\n").encode())
        raise


def start_together(space: Space, count: int) -> list[dict[str, object]]:
    """Start `count` processes at one moment; return what they told, and check how they ended."""
    (start, go), (stop, leave), (told, report) = os.pipe(), os.pipe(), os.pipe()

    def body(me: int) -> None:
        os.close(go)
        os.close(leave)
        compete(space, me, start, stop, report)

    children = [fork(lambda me=me: body(me)) for me in range(count)]  # type: ignore[misc]
    os.close(go)
    with os.fdopen(told) as lines:
        accounts = [json.loads(lines.readline()) for _ in range(count)]
    os.close(leave)
    codes = {child: wait(child) for child in children}
    for descriptor in (start, stop, report):
        os.close(descriptor)
    for account in accounts:
        assert codes[account["pid"]] == (0 if account["proceeds"] else CacheBusy.exit_code)
    return accounts


@pytest.mark.timeout(120)
def test_of_processes_that_start_together_one_proceeds(tmp_path: Path) -> None:
    unnamed, slowest = [], 0.0
    for number in range(STARTS):
        space = open_space(tmp_path / f"cache-{number // 10}")  # one start in ten finds no cache at all
        accounts = start_together(space, 2 + number % 3)
        proceeding = [one for one in accounts if one["proceeds"]]
        assert len(proceeding) == 1
        for one in accounts:
            if not one["proceeds"]:
                slowest = max(slowest, float(str(one["seconds"])))
                if f"process {proceeding[0]['pid']} on " not in str(one["said"]):
                    unnamed.append(one["said"])
        assert len(read_all(space)) == 1 or number % 10
    assert slowest < 1
    assert not unnamed, f"{len(unnamed)} told another holder, such as {unnamed[0]}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", tier([3], [2, 3, 4]))
def test_of_commands_that_start_together_one_proceeds(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], count: int
) -> None:
    """The one that got in is stopped until the others have ended, so that none of them comes too late to compete."""
    photos = write_photos(tmp_path / "photos", per_class=150)
    cache = tmp_path / "work" / "cache"
    commands = [start("extract", photos, *TINY, "--batch-size", 1, "--json") for _ in range(count)]
    holder = wait_for_holder(cache, {command.pid for command in commands})
    os.kill(holder, signal.SIGSTOP)
    try:
        for command in commands:
            if command.pid != holder:
                _, err = command.communicate(timeout=120)
                assert command.returncode == CacheBusy.exit_code, err
                assert f"process {holder} on " in err
    finally:
        os.kill(holder, signal.SIGCONT)
    (first,) = [command for command in commands if command.pid == holder]
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["data"]["computed"] == 450


def wait_for_holder(cache: Path, among: set[int]) -> int:
    """Return the process that the lock file names."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for lock in cache.glob("spaces/*/.lock"):
            words = lock.read_text().split()
            if len(words) > 1 and int(words[1]) in among:
                return int(words[1])
        time.sleep(0.005)
    raise AssertionError("nobody took the lock")

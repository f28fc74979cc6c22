"""The real command line is killed, stopped and interrupted: what was committed stays, and a resume ends the same."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from ._tier import tier
from .checking import problem_of
from .conftest import Tally
from .extracting import Extraction, await_lock, await_shards, check_ended, check_killed, kill, shards_of

CODES = {signal.SIGTERM: 5, signal.SIGINT: 130}


def test_sigkill(extraction: Extraction, tmp_path: Path, full: bool, tally: Tally) -> None:
    """Random SIGKILLs of the real command line over whole extractions with compaction."""
    chance, number, wanted = random.Random(0), 0, 200 if full else 6
    base = tmp_path / "base"
    assert extraction.start(base, "cache", "--limit", 22).wait() == 0
    while tally.trials < wanted:
        folder, number = tmp_path / str(number), number + 1
        if number % 2:
            shutil.copytree(base, folder)
        for _ in range(chance.randint(1, 4)):
            kill_once(extraction, folder, chance, tally)
        problem = problem_of(extraction.check_resumed, folder, folder / "cache")
        if problem:
            tally.bad.append(f"extraction {number}: {problem}")
    tally.note = f"{number} extractions"
    assert not tally.bad, "\n".join(tally.bad)


def kill_once(extraction: Extraction, folder: Path, chance: random.Random, tally: Tally) -> None:
    """Kill an extraction at a random time of its writing phase, each third time about its merge."""
    cache, fresh = folder / "cache", tally.trials % 20 == 19
    trial = extraction.start(folder, "cache", fresh=fresh)
    space = await_lock(cache)
    if chance.random() < 1 / 3:
        await_shards(space, 15 - extraction.check_rows(cache) // 4, trial)
        time.sleep(chance.uniform(0, 0.03))
    else:
        time.sleep(chance.uniform(0, extraction.seconds))
    committed = shards_of(space)
    if kill(trial) == -signal.SIGKILL:
        tally.add(problem_of(check_killed, extraction, cache, committed), folder.name)


@pytest.mark.parametrize("number", tier([signal.SIGTERM], list(CODES)), ids=lambda number: number.name)
def test_stopped(extraction: Extraction, tmp_path: Path, full: bool, tally: Tally, number: signal.Signals) -> None:
    """SIGTERM or SIGINT in the middle of an extraction."""
    chance, slowest, partial, wanted = random.Random(0), 0.0, 0, 10 if full else 1
    for k in range(6 * wanted):
        if tally.trials == wanted:
            break
        folder = tmp_path / str(k)
        trial = extraction.start(folder, "cache", "--shard-rows", 12, fresh=True)
        await_shards(await_lock(folder / "cache"), 1, trial)
        time.sleep(chance.uniform(0, 0.06))
        trial.signal(number)
        started = time.monotonic()
        code = trial.wait()
        slowest = max(slowest, time.monotonic() - started)
        rows = extraction.check_rows(folder / "cache")
        if rows < len(extraction.rows):  # the signal was in time
            partial += rows % 12 > 0
            ended = problem_of(check_ended, trial, code, CODES[number])
            tally.add(ended or problem_of(extraction.check_resumed, folder, folder / "cache"), k)
    tally.note = (
        f"{number.name}, gone after {slowest:.2f} s at most, {partial} shards were committed that were not full"
    )
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.trials == wanted, "the extractions end too soon"
    assert slowest < 5
    assert partial or not full

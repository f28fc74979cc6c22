"""A real disk of 20 MB runs full while the command line works."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .checking import problem_of
from .conftest import Tally
from .extracting import Extraction, await_lock, await_shards, check_ended

PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(ballast: Path, spare_bytes: int) -> None:
    """Fill the disk but for some bytes."""
    size = shutil.disk_usage(ballast.parent).free - spare_bytes
    ballast.write_bytes(bytes(size))


def test_full_disk(extraction: Extraction, small_disk: Path, tmp_path: Path, full: bool, tally: Tally) -> None:
    """A disk of 20 MB runs full under the real command line."""
    chance = random.Random(0)
    for number in range(20 if full else 1):
        folder, cache = tmp_path / str(number), small_disk / str(number)
        trial = extraction.start(folder, cache, fresh=number == 0)
        await_shards(await_lock(cache), 1 + number % 8, trial)
        trial.signal(signal.SIGSTOP)
        before = extraction.check_rows(cache)
        fill(small_disk / "ballast", chance.randrange(0, 20) * PAGE)
        trial.signal(signal.SIGCONT)
        code = trial.wait()
        problem = problem_of(check_ended, trial, code, 74)
        kept = extraction.check_rows(cache)
        (small_disk / "ballast").unlink()
        tally.add(problem or problem_of(extraction.check_resumed, folder, cache), number)
        assert kept >= before, f"{before - kept} committed rows are lost"
        shutil.rmtree(cache)
    assert not tally.bad, "\n".join(tally.bad)

"""The processes of a command that is killed: decoders gone and the lock free within 5 s, also in the middle of an image."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from embedpipe.cache import Cache
from tests.conftest import TINY, write_photos

from ._tier import tier

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty images that decode at once, and forty that take seconds each."""
    write_photos(tmp_path / "data", per_class=20, classes=("blue", "red"))
    Image.new("RGB", (13_000, 13_000)).save(tmp_path / "slow.png", compress_level=1)
    for k in range(40):
        (tmp_path / "data" / "slow").mkdir(exist_ok=True)
        content = (tmp_path / "slow.png").read_bytes() + b"%d" % k  # what follows the end of a PNG is ignored
        (tmp_path / "data" / "slow" / f"{k}.png").write_bytes(content)
    return tmp_path / "data"


def decoders(process: subprocess.Popen[str]) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for task in tasks for pid in task.read_text().split()]
    return [pid for pid in pids if b"_serving" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_until_some_rows_are_safe(process: subprocess.Popen[str], work: Path) -> None:
    deadline = time.monotonic() + 120
    while not (list(work.glob("cache/spaces/*/shards/*.h5")) and decoders(process)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("number", "times", "code"),
    [
        (signal.SIGKILL, 1, -9),
        (signal.SIGTERM, 4, 5),
        (signal.SIGINT, 1, 130),
        *tier([], [(signal.SIGTERM, 1, 5), (signal.SIGINT, 2, 130)]),
    ],
)
def test_a_command_that_is_stopped_leaves_nobody_behind(
    start: Start, data: Path, tmp_path: Path, number: signal.Signals, times: int, code: int
) -> None:
    process = start("extract", data, *TINY, "--batch-size", 4, "--shard-rows", 8, "--workers", 2)
    wait_until_some_rows_are_safe(process, tmp_path / "work")
    pids = decoders(process)
    begun = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.03)
    _, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    assert "Traceback" not in err
    while any(map(is_running, pids)):
        assert time.monotonic() - begun < 5
        time.sleep(0.02)
    assert time.monotonic() - begun < 5
    [space] = Cache(tmp_path / "work" / "cache").spaces()
    space.ensure_free()
    assert len(space.view()) >= 8

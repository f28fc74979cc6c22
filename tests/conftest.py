"""Real image files, and the command line as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

hypothesis.settings.register_profile("embedpipe", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("embedpipe")

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}
TINY = ["--backbone", "timm:test_resnet", "--weights", "none"]  # random weights: mechanics, no accuracy


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def write_photo(path: Path, colour: tuple[int, int, int], seed: int) -> Path:
    """Write a noisy image of one colour, 48 x 40 pixels."""
    noise = np.random.default_rng(seed).normal(0, 25, (40, 48, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)
    return path


def write_photos(
    folder: Path, per_class: int = 12, classes: tuple[str, ...] = tuple(COLOURS), *, seed: int = 0
) -> Path:
    """Write class folders of PNG files, other ones for another seed."""
    for c, name in enumerate(classes):
        for k in range(per_class):
            write_photo(folder / name / f"{k:03d}.png", COLOURS[name], seed=100_000 * seed + 1000 * c + k)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders: blue, green, red with 12 images each."""
    return write_photos(tmp_path / "photos")


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def data(self) -> dict[str, Any]:
        assert self.envelope["ok"], self.envelope
        found: dict[str, Any] = self.envelope["data"]
        return found

    @property
    def line(self) -> str:
        """The error: one line, no traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Call the command line in this process, from an empty folder."""
    import warnings

    from embedpipe.cli import main

    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command line in a process of its own, from an empty folder; it does not outlive the test."""
    (tmp_path / "work").mkdir(exist_ok=True)
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "embedpipe", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        cwd = tmp_path / "work"
        processes.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()

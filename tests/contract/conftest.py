"""Helpers of the contract tests: images from a formula and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

RECORD = os.environ.get("EMBEDPIPE_RECORD_CONTRACT") == "1"  # add missing references, see README.md


@dataclass(frozen=True)
class Completed:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        """The JSON object in the last line of standard output."""
        envelope: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return envelope

    @property
    def data(self) -> dict[str, Any]:
        assert self.envelope["ok"], self.envelope
        data: dict[str, Any] = self.envelope["data"]
        return data


@dataclass(frozen=True)
class CommandLine:
    """Runs `embedpipe` commands in this process, from one working folder and with a per-user cache of its own."""

    folder: Path

    def __call__(self, *arguments: object) -> Completed:
        from embedpipe.cli import main  # the console script's entry point

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        environment = {"XDG_CACHE_HOME": str(self.folder / "user-cache"), "COLUMNS": "200", "NO_COLOR": "1"}
        try:
            with (
                contextlib.chdir(self.folder),
                mock.patch.dict(os.environ, environment),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(),
                pytest.raises(SystemExit) as exit_info,
            ):
                main([str(argument) for argument in arguments])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        texts = [stream.buffer.getvalue().decode(errors="surrogateescape") for stream in (out, err)]
        return Completed(int(exit_info.value.code or 0), *texts)


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    """The command line in an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    return CommandLine(folder)


def wave(seed: int, size_px: int) -> np.ndarray:
    """Return an RGB image of sine waves (size_px, size_px, 3) uint8 with frequencies that depend on `seed`."""
    y, x = np.mgrid[0:size_px, 0:size_px] / size_px
    channels = [np.sin(2 * np.pi * ((1 + seed + c) * x + (1 + (3 * seed + c) % 5) * y) + c) for c in range(3)]
    return np.round(127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_split_folders(folder: Path, counts: dict[str, int], classes: int = 3) -> Path:
    """Write `counts[split]` images of 40 x 40 pixels in each of the first classes blue, green and red of each split."""
    colours = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}
    for s, (split, count) in enumerate(counts.items()):
        for c, (name, colour) in enumerate(list(colours.items())[:classes]):
            for k in range(count):
                noise = np.random.default_rng([s, c, k]).normal(0, 25, (40, 40, 3))
                pixels = np.clip(noise + colour, 0, 255).astype(np.uint8)
                write_image(folder / split / name / f"{k:03d}.png", pixels)
    return folder

"""Real extractions with injected faults: photos, the command line, and checks of the cache afterwards."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedpipe.cache import Cache, Space

from ..conftest import TINY, write_photos
from .processes import Trial, Warm, last_lines, start_fresh

IMAGES = 60
SMALL = ["--batch-size", 4, "--shard-rows", 4, "--workers", 1, "--device", "cpu", "--json"]


@dataclass
class Extraction:
    """The extraction of one set of photos, and what an unbroken one gives.

    Attributes
    ----------
    rows : dict of key to row
    whole : features.h5
    seconds : from the lock to the last word; leaving the process comes after that
    """

    warm: Warm
    folder: Path
    photos: Path = field(init=False)
    rows: dict[bytes, bytes] = field(default_factory=dict)
    whole: bytes = b""
    seconds: float = 0

    def __post_init__(self) -> None:
        self.photos = write_photos(self.folder / "photos", IMAGES // 3)
        trial = self.start(self.folder / "whole", "cache")
        await_lock(self.folder / "whole" / "cache")
        started = time.monotonic()
        await_output(trial)
        self.seconds = time.monotonic() - started
        assert trial.wait() == 0, trial.err
        space = space_of(self.folder / "whole" / "cache")
        assert space is not None
        self.whole, self.rows = space.features_path.read_bytes(), rows_of(space)

    def start(self, folder: Path, cache: object, *more: object, fresh: bool = False, go: bool = True) -> Trial:
        """Start the command line, everything imported or as a user does; without `go` it waits for `Trial.go`."""
        argv = ["extract", self.photos, *TINY, *SMALL, "--cache-dir", cache, *more]
        environment = {"XDG_CACHE_HOME": str(self.folder / "user-cache")}
        trial = (start_fresh if fresh else self.warm.start)(folder, *argv, **environment)
        return trial.go() if go else trial

    def check_rows(self, cache: Path) -> int:
        """No row is wrong; return how many there are."""
        space = space_of(cache)
        found = rows_of(space) if space else {}
        wrong = [key.hex() for key, row in found.items() if self.rows.get(key) != row]
        assert not wrong, f"rows {wrong} are wrong"
        return len(found)

    def check_resumed(self, folder: Path, cache: Path) -> None:
        """The same command again computes exactly what is missing and ends with the same file."""
        present = self.check_rows(cache)
        trial = self.start(folder, cache)
        await_output(trial)
        kill(trial)  # all is said; a forked process takes two seconds to leave
        data, space = envelope(trial)["data"], space_of(cache)
        assert data["computed"] == IMAGES - present, f"{data['computed']} computed, {IMAGES - present} were missing"
        assert space is not None
        assert space.features_path.read_bytes() == self.whole, "features.h5 differs from that of an unbroken run"
        assert (space.pending_shards, space.interrupted) == (0, False), "the resumed run is not finished"
        assert not (left := list(space.folder.rglob(".tmp-*"))), f"left behind: {left}"


def space_of(cache: Path) -> Space | None:
    spaces = Cache(cache).spaces()
    return spaces[0] if spaces else None


def rows_of(space: Space) -> dict[bytes, bytes]:
    view = space.view()
    keys = [key.tobytes() for key in view.keys]
    assert len(set(keys)) == len(keys), "a row is there twice"
    return dict(zip(keys, map(np.ndarray.tobytes, view.read(keys)), strict=True)) if keys else {}


def envelope(trial: Trial) -> Any:
    return json.loads(trial.out.splitlines()[-1])


def await_lock(cache: Path, seconds: float = 60) -> Path:
    """Wait until a writer has begun; return the folder of its space."""
    until = time.monotonic() + seconds
    while not (found := list(cache.glob("spaces/*/.lock"))):
        assert time.monotonic() < until, "no writer has begun"
        time.sleep(0.001)
    return found[0].parent


def shards_of(space: Path) -> set[str]:
    """Return the names of the committed shards."""
    return {path.name for path in space.glob("shards/[!.]*.h5")}


def await_output(trial: Trial) -> None:
    """Wait until the last word of a process that succeeds."""
    until = time.monotonic() + 60
    while not trial.out.endswith("\n"):
        assert time.monotonic() < until, f"no output comes; {trial.err}"
        time.sleep(0.001)


def await_shards(space: Path, count: int, trial: Trial) -> set[str]:
    """Wait until so many shards are there, or the process has ended or merged them."""
    until = time.monotonic() + 60
    while len(names := shards_of(space)) < count and not trial.out:
        assert time.monotonic() < until, "no shards come"
        time.sleep(0.001)
    return names


def check_ended(trial: Trial, code: int, expected: int) -> None:
    """The process ended with the documented code and one line."""
    assert code == expected, f"ended {code}: {trial.err}"
    assert len(last_lines(trial)) == 1, trial.err
    assert "Traceback" not in trial.err, trial.err
    assert envelope(trial)["ok"] is False


def kill(trial: Trial) -> int:
    """Kill a process where it stands; return how it ended, perhaps before that."""
    with suppress(ProcessLookupError):
        trial.signal(signal.SIGKILL)
    return trial.wait()


def check_killed(extraction: Extraction, cache: Path, committed: set[str]) -> None:
    """No row is wrong, and the shards that were committed are there or merged."""
    rows, space = extraction.check_rows(cache), space_of(cache)
    lost = committed - shards_of(space.folder) if space else committed
    assert not lost or rows == len(extraction.rows), f"shards {lost} are lost"

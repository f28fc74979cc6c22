"""Spaces in a temporary folder, and rows to write into them."""

from __future__ import annotations

import hashlib
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpipe.cache import Cache, Space

SPEC = {"schema": 1, "source": "timm", "architecture": "resnet18", "layer": "penultimate"}
DIM = 8


def rows(n: int, dim: int = DIM) -> tuple[list[bytes], np.ndarray]:
    """Return n keys and features (n, dim); row i is always the same."""
    keys = [hashlib.sha256(b"%d" % i).digest() for i in range(n)]
    X = np.stack([np.arange(dim, dtype=np.float32) / 7 + i for i in range(n)])
    return keys, X


def write(space: Space, keys: list[bytes], X: np.ndarray, finish: dict[str, int] | None = None, **options: Any) -> None:
    """Run a whole extraction, in batches of 7; `finish` are arguments of `SpaceWriter.finish`."""
    chosen = {"feature_dim": X.shape[1], "dtype": "float32", "environment": {}, "pins": {}}
    with space.writer(**{**chosen, **options}) as writer:
        for start in range(0, len(keys), 7):
            writer.append(keys[start : start + 7], X[start : start + 7])
        writer.finish(**(finish or {}))


def forked(body: Callable[[], None]) -> int:
    """Run `body` in a child and return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            body()
        except BaseException as exc:  # noqa: BLE001  the child must not return into pytest
            traceback.print_exc()
            code = getattr(exc, "exit_code", 99)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def space(cache: Cache) -> Space:
    return cache.open_space(SPEC)

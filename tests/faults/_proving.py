"""Self-checking rows: the features of a key are its own 32 bytes, so a wrong, mixed or partial row is detected."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embedpipe.cache import Cache, Space

SPEC = {"schema": 1, "source": "timm", "architecture": "resnet18", "layer": "penultimate"}
DIM = 64
OPTIONS: dict[str, Any] = {"feature_dim": DIM, "dtype": "float32", "environment": {}, "pins": {}}


def keys_of(numbers: Iterable[int]) -> list[bytes]:
    return [hashlib.sha256(b"%d" % number).digest() for number in numbers]


def features_of(keys: Iterable[bytes], dim: int = DIM) -> np.ndarray:
    """Return float32 (n, dim): the bytes of each key as numbers, over and over."""
    values = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    return np.tile(values, (1, dim // 32)).astype(np.float32)


def open_space(root: Path) -> Space:
    return Cache(root).open_space(SPEC)


def read_all(space: Space) -> set[bytes]:
    """Return the keys of a space after reading every row and finding it right."""
    view = space.view()
    keys = [key.tobytes() for key in view.keys]
    assert (view.read(keys) == features_of(keys, view.feature_dim)).all() if keys else True
    return set(keys)


def fork(body: Callable[[], object]) -> int:
    """Run `body` in a child, which ends with 0 or with the exit code of the error; return its process id."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            body()
        except BaseException as exc:  # noqa: BLE001  the child must not return into pytest
            code = getattr(exc, "exit_code", 99)
            if code == 99:
                traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def wait(child: int) -> int:
    """Return the exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

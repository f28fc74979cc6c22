"""The child's side of an isolated decoder: requests come on stdin, pixels leave on stdout.

A request is a line of JSON: path, key (hex, or null), transform (a dict, or null for the image as it is). An answer is
`HEADER` (kind, height or length, width) and then uint8 (height, width, 3), or the reason of a failure. The process
leaves as soon as its parent has gone, even in the middle of an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from embedpipe.errors import DecodeError
from embedpipe.images._decode import decode_image
from embedpipe.images._transform import Transform

HEADER = struct.Struct("<III")
PIXELS = 0
STAGES = {1: "read", 2: "decode", 3: "limit"}


def serve(memory_bytes: int) -> None:
    """Answer requests until the parent leaves; more memory than `memory_bytes` is a failure of the image at hand."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    _limit_memory(memory_bytes)
    requests: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    _write(answers, HEADER.pack(PIXELS, 0, 0))  # ready
    while True:
        _write(answers, *_answer(json.loads(requests.get()), memory_bytes))


def _listen(requests: SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _answer(request: Mapping[str, Any], memory_bytes: int) -> tuple[bytes, ...]:
    try:
        pixels = load_pixels(Path(request["path"]), request["key"], request["transform"])
    except DecodeError as exc:
        return _failure("decode", str(exc))
    except MemoryError:
        return _failure("limit", f"needs more than {memory_bytes >> 20} MiB of memory")
    except OSError as exc:
        return _failure("read", exc.strerror or str(exc))
    return HEADER.pack(PIXELS, *pixels.shape[:2]), pixels.tobytes()


def _failure(stage: str, reason: str) -> tuple[bytes, ...]:
    kind = next(kind for kind, name in STAGES.items() if name == stage)
    text = reason.encode("utf-8", "backslashreplace")
    return HEADER.pack(kind, len(text), 0), text


def load_pixels(path: Path, key: str | None, transform: Mapping[str, Any] | None) -> np.ndarray:
    """Return uint8 (H, W, 3) of a file, resized and cropped where a transform is given.

    Raises
    ------
    DecodeError    its decoder refuses it
    OSError        it cannot be read, or its sha256 is not `key`
    """
    data = path.read_bytes()
    if key is not None and hashlib.sha256(data).hexdigest() != key:
        raise OSError("changed while reading")
    image = decode_image(data)
    return np.asarray(image) if transform is None else Transform.from_dict(transform).pixels(image)


def _write(descriptor: int, *parts: bytes) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]

"""The process of an isolated decoder: it reads requests from stdin and writes pixels to stdout.

A request is a line of JSON: path and part of a `ByteSource`, key (hex, or null), transforms (each its `text`, or null for the
image as it is), bytes: how many bytes of the image follow the line, or null where this process reads the place itself. The answer
has, for each transform, `HEADER` (kind, height or length, width) and then uint8 (height, width, 3), or the reason of a failure.
After some images the compiled resize is loaded if numba is installed; its pixels are the same.
The process ends as soon as its parent has ended, even in the middle of an image.
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
from contextlib import suppress
from functools import lru_cache
from itertools import count
from queue import SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from embedpipe.data import ByteSource
from embedpipe.errors import DecodeError
from embedpipe.images._decode import decode_image
from embedpipe.images._transform import Resample, Transform

HEADER = struct.Struct("<III")
PIXELS = 0
STAGES = ("", "read", "decode", "limit")  # of a failure, by kind
Request = tuple[dict[str, Any], bytes | None]
FAILURES = (DecodeError, MemoryError, OSError)  # of an image; any other error ends the process


def serve(memory_bytes: int, compiled_after: int) -> None:
    """Answer requests until the parent ends; an image that needs more memory than `memory_bytes` fails.

    compiled_after : int    images after which the compiled resize is loaded
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    requests: SimpleQueue[Request] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    _write(answers, HEADER.pack(PIXELS, 0, 0))  # ready
    loaded: list[Resample] = []
    for answered in count():
        if answered == compiled_after:
            threading.Thread(target=_load_resampler, args=(loaded,), daemon=True).start()
        _write(answers, *_answer(requests.get(), memory_bytes, loaded[0] if loaded else None))


def _load_resampler(loaded: list[Resample]) -> None:
    with suppress(ImportError, RuntimeError):  # numba is not installed, or cannot cache compiled code
        from embedpipe.images._resampling import Resampler

        loaded.append(Resampler())


def _listen(requests: SimpleQueue[Request]) -> None:
    """Queue requests as they arrive, so that the parent never waits to write; end the process at the end of stdin."""
    try:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            size = request["bytes"]
            requests.put((request, None if size is None else sys.stdin.buffer.read(size)))
    finally:
        os._exit(0)


def _answer(request_and_data: Request, memory_bytes: int, resample: Resample | None) -> list[bytes]:
    request, data = request_and_data
    transforms, key = request["transforms"], request["key"]
    try:
        image = load_image(ByteSource(request["path"], request["part"]).read() if data is None else data, key)
    except FAILURES as exc:
        return _failure(exc, memory_bytes) * len(transforms)

    def answer(transform: str | None) -> list[bytes]:
        try:
            canonical = transform and _transform(transform)
            pixels = canonical.window(image, key or "", resample) if canonical else np.asarray(image)
        except FAILURES as exc:
            return _failure(exc, memory_bytes)
        return [HEADER.pack(PIXELS, *pixels.shape[:2]), pixels.tobytes()]

    return [part for transform in transforms for part in answer(transform)]


@lru_cache(64)
def _transform(text: str) -> Transform:
    return Transform.from_dict(json.loads(text))


def _failure(exc: Exception, memory_bytes: int) -> list[bytes]:
    if isinstance(exc, DecodeError):
        stage, reason = "decode", str(exc)
    elif isinstance(exc, MemoryError):
        stage, reason = "limit", f"needs more than {memory_bytes >> 20} MiB of memory"
    else:
        stage, reason = "read", getattr(exc, "strerror", None) or str(exc)
    text = reason.encode("utf-8", "backslashreplace")
    return [HEADER.pack(STAGES.index(stage), len(text), 0), text]


def load_image(data: bytes, key: str | None) -> Image.Image:
    """Return the RGB image in `data`.

    Raises
    ------
    DecodeError    the decoder refuses it
    OSError        its sha256 is not `key`
    """
    if key is not None and hashlib.sha256(data).hexdigest() != key:
        raise OSError("changed while reading")
    return decode_image(data)


def _write(descriptor: int, *parts: bytes) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]

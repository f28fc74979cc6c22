"""Isolated decoders: each is a separate process, with a time limit and a memory limit for every image.

A crash, a hang or a decompression bomb costs one image and one process, never the run. The processes start with the
first image, are reused for the next batch of images, and end with this process.

>>> [pixels] = Decoders().load(ByteSource("/data/cat.jpg"), key=None, transforms=[None])
>>> pixels.shape
(375, 500, 3)
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedpipe.data import ByteSource
from embedpipe.errors import EmbedpipeError
from embedpipe.images._serving import HEADER, PIXELS, STAGES

Loaded = np.ndarray | tuple[str, str]

START_LIMIT_S = 60.0
PIPE_BYTES = 1 << 20
ENVIRONMENT = {  # one thread; freed memory of the size of an image is reused for the next one
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PILLOW_BLOCKS_MAX": "16",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
COMPILED_AFTER = 400  # images of a decoder, after which loading the compiled resize saves more time than it takes
SERVE = "import sys; sys.path[:] = {path!r}; from embedpipe.images._serving import serve; serve({memory}, {after})"


@dataclass(frozen=True)
class Limits:
    """Limits for one image.

    memory_bytes : int    address space of a decoder; an RGBA image of MAX_PIXELS over white takes about 3 GiB
    """

    time_s: float = 60.0
    memory_bytes: int = 4 << 30


LIMITS = Limits()

_pool: list[Decoder] = []  # decoders that are starting, then idle ones


class Decoder:
    """A decoder process.

    Parameters
    ----------
    limits : Limits
    compiled_after : int    images after which it loads the compiled resize
    wait : bool             wait for its start; otherwise `await_start` must be called before the first image

    Raises
    ------
    EmbedpipeError    it does not start
    """

    def __init__(self, limits: Limits = LIMITS, *, compiled_after: int = COMPILED_AFTER, wait: bool = True) -> None:
        self.limits, self.started = limits, False
        code = SERVE.format(path=sys.path, memory=limits.memory_bytes, after=compiled_after)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, **ENVIRONMENT},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._requests, self._answers):
            with suppress(AttributeError, OSError):  # Linux only: room for a whole image
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._requests.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._requests, select.POLLOUT)
        self._readable.register(self._answers, select.POLLIN)
        if wait:
            self.await_start()

    def await_start(self) -> None:
        """Wait for its first answer, which reports that it has started."""
        try:
            self._read(HEADER.size, time.monotonic() + START_LIMIT_S)
            self.started = True
        except (EOFError, TimeoutError) as exc:
            self.close()
            hint = "see what `python -c 'import embedpipe.images._serving'` says, or free some memory"
            raise EmbedpipeError("a decoder process does not start", hint=hint) from exc

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def load(
        self, place: ByteSource, *, key: bytes | None, transforms: Sequence[str | None], data: bytes | None = None
    ) -> list[Loaded]:
        """Return, for each transform, uint8 (H, W, 3) of an image, or (stage, reason) of its failure.

        Parameters
        ----------
        place : ByteSource                     where the bytes of the image are
        data : bytes or None              the bytes; None: the decoder process reads them
        key : bytes or None               expected sha256 of the bytes; None: no check
        transforms : list of str or None  `text` of a `Transform`, whose resize and crop are applied; None: the whole image
        """
        request: dict[str, Any] = {"path": place.path, "part": place.part, "key": key.hex() if key else None}
        request |= {"transforms": transforms, "bytes": None if data is None else len(data)}
        deadline = time.monotonic() + self.limits.time_s
        try:
            self._write(json.dumps(request).encode() + b"\n", deadline)
            self._write(data or b"", deadline)
            return [self._receive(deadline) for _ in transforms]
        except TimeoutError:
            self.close()
            return [("limit", f"took longer than {self.limits.time_s:.0f} s")] * len(transforms)
        except (EOFError, BrokenPipeError):
            code = self.close(grace_s=5)
            end = f"ended with {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"
            return [("limit", f"the decoder {end}")] * len(transforms)

    def _receive(self, deadline: float) -> Loaded:
        kind, height, width = HEADER.unpack(self._read(HEADER.size, deadline))
        if kind != PIXELS:
            return STAGES[kind], self._read(height, deadline).decode()
        return np.frombuffer(self._read(height * width * 3, deadline), np.uint8).reshape(height, width, 3)

    def close(self, grace_s: float = 0) -> int:
        """Wait up to `grace_s` seconds for the process to end, kill it, and return its exit code, negative for a signal."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._process.kill()
        self._requests.close()
        self._answers.close()
        return self._process.wait()

    def interrupt(self) -> None:
        """Kill the process, from another thread than the one that waits for it."""
        self._process.kill()

    def forget(self) -> None:
        """Do not touch the process, which belongs to the parent of this fork."""
        self._process.returncode = 0

    def _write(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            if not self._writable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            with suppress(BlockingIOError):
                left = left[os.write(self._requests.fileno(), left) :]

    def _read(self, count: int, deadline: float) -> bytearray:
        data, got = bytearray(count), 0
        while got < count:
            if not self._readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            taken = os.readv(self._answers.fileno(), [memoryview(data)[got:]])
            if not taken:
                raise EOFError
            got += taken
        return data


class Decoders:
    """At most `count` decoder processes, taken from those that are idle.

    More threads than `count` may call `load`: bytes that a decoder process cannot read are read by the thread, before it
    waits for a decoder.
    """

    def __init__(self, count: int = 1, limits: Limits = LIMITS) -> None:
        self.count, self._slots, self._limits = count, threading.Semaphore(count), limits
        self._busy: set[Decoder] = set()
        self._ended = False
        self._lock = threading.Lock()

    def load(self, place: ByteSource, *, key: bytes | None, transforms: Sequence[str | None]) -> list[Loaded]:
        """Return the result of `Decoder.load`."""
        data = None
        if not place.is_local_range:
            try:
                data = place.read()
            except OSError as exc:
                return [("read", exc.strerror or str(exc))] * len(transforms)
        with self._slots:
            if self._ended:
                return [("limit", "given up")] * len(transforms)
            decoder = _take(self._limits)
            with self._lock:
                self._busy.add(decoder)
                if self._ended:
                    decoder.interrupt()
            reusable = False
            try:
                loaded = decoder.load(place, key=key, transforms=transforms, data=data)
                reusable = decoder.alive
                return loaded
            finally:
                with self._lock:
                    self._busy.discard(decoder)
                    reusable = reusable and not self._ended
                _pool.append(decoder) if reusable else decoder.close()

    def give_up(self) -> None:
        """Kill every busy process: the threads that wait for them return at once."""
        with self._lock:
            self._ended = True
            for decoder in self._busy:
                decoder.interrupt()


def start_decoders(count: int, images: int) -> None:
    """Start `count` processes for the decoding of `images` images, without waiting for them."""
    after = 0 if images >= count * COMPILED_AFTER else COMPILED_AFTER
    _pool[:0] = [Decoder(compiled_after=after, wait=False) for _ in range(count - len(_pool))]


def _take(limits: Limits) -> Decoder:
    """Return an idle decoder with these limits, one that is starting, or a new one."""
    while _pool:
        with suppress(IndexError, EmbedpipeError):  # taken by another thread; or it ended while it was starting
            decoder = _pool.pop()
            if decoder.limits != limits:
                decoder.close()
                continue
            if not decoder.started:
                decoder.await_start()
            return decoder
    return Decoder(limits)


@atexit.register
def close_decoders() -> None:
    """End all idle decoder processes; the next image starts new ones."""
    while _pool:
        _pool.pop().close()


def _forget_decoders() -> None:
    while _pool:
        _pool.pop().forget()


os.register_at_fork(after_in_child=_forget_decoders)

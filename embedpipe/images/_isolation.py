"""Decoders that may die: each is a process of its own, with a limit of time and of memory for every image.

A crash, a hang or a bomb in a decoder costs one image and one process, never the run. The processes start when the
first image is wanted, stay for the next batch of images, and leave with this one.

>>> [pixels] = Decoders().load(Place("/data/cat.jpg"), key=None, transforms=[None])
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
from typing import Any

import numpy as np

from embedpipe.data import Place
from embedpipe.errors import EmbedpipeError
from embedpipe.images._serving import HEADER, PIXELS, STAGES

Loaded = np.ndarray | tuple[str, str]

TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 4 << 30  # of address space: an RGBA image of MAX_PIXELS over white takes about 3 GiB
START_LIMIT_S = 60.0
PIPE_BYTES = 1 << 20
SETTINGS = {  # one thread; and memory of the size of an image is kept for the next one
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PILLOW_BLOCKS_MAX": "16",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
PATIENCE = 400  # images of a decoder after which it loads the compiled resize; that takes as long as it saves on these
SERVE = "import sys; sys.path[:] = {path!r}; from embedpipe.images._serving import serve; serve({memory}, {patience})"

_idle: list[Decoder] = []
_starting: list[Decoder] = []


class Decoder:
    """A decoder process.

    Parameters
    ----------
    patience : int    images after which it loads the compiled resize
    ahead : bool      let it start while its parent goes on; `await_start` has to come before the first image

    Raises
    ------
    EmbedpipeError    it does not start
    """

    def __init__(self, patience: int = PATIENCE, *, ahead: bool = False) -> None:
        code = SERVE.format(path=sys.path, memory=MEMORY_LIMIT_BYTES, patience=patience)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, **SETTINGS},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._requests, self._answers):
            with suppress(AttributeError, OSError):  # Linux; an image at a time goes through without a halt
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._requests.fileno(), False)
        self._room = select.poll()
        self._room.register(self._requests, select.POLLOUT)
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        if not ahead:
            self.await_start()

    def await_start(self) -> None:
        """Take its first answer, which says that it is there."""
        try:
            self._read(HEADER.size, time.monotonic() + START_LIMIT_S)
        except (EOFError, TimeoutError) as exc:
            self.close()
            raise EmbedpipeError(
                "a decoder process does not start",
                hint="see what `python -c 'import embedpipe.images._serving'` says, or free some memory",
            ) from exc

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def load(
        self, place: Place, *, key: bytes | None, transforms: Sequence[str | None], data: bytes | None = None
    ) -> list[Loaded]:
        """Return, for each transform, uint8 (H, W, 3) of an image, or (stage, reason) of its failure.

        Parameters
        ----------
        place : Place                     where its bytes are
        data : bytes or None              these bytes; None: the decoder reads the place itself
        key : bytes or None               their sha256; other bytes are a failure
        transforms : list of str or None  `text` of a `Transform`, whose resize and crop are applied; None: the whole image
        """
        request: dict[str, Any] = {"path": place.path, "part": place.part, "key": key.hex() if key else None}
        request |= {"transforms": transforms, "bytes": None if data is None else len(data)}
        deadline = time.monotonic() + TIME_LIMIT_S
        try:
            self._write(json.dumps(request).encode() + b"\n", deadline)
            self._write(data or b"", deadline)
            return [self._receive(deadline) for _ in transforms]
        except TimeoutError:
            self.close()
            return [("limit", f"took longer than {TIME_LIMIT_S:.0f} s")] * len(transforms)
        except (EOFError, BrokenPipeError):
            return [("limit", f"the decoder {_end_of(self.close(grace_s=5))}")] * len(transforms)

    def _receive(self, deadline: float) -> Loaded:
        kind, height, width = HEADER.unpack(self._read(HEADER.size, deadline))
        if kind != PIXELS:
            return STAGES[kind], self._read(height, deadline).decode()
        return np.frombuffer(self._read(height * width * 3, deadline), np.uint8).reshape(height, width, 3)

    def close(self, grace_s: float = 0) -> int:
        """End the process, at once if not within `grace_s`, and return its exit code, negative for a signal."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._process.kill()
        self._requests.close()
        self._answers.close()
        return self._process.wait()

    def interrupt(self) -> None:
        """End the process from another thread than the one that waits for it."""
        self._process.kill()

    def forget(self) -> None:
        """Leave the process to the parent of this fork."""
        self._process.returncode = 0

    def _write(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            if not self._room.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            with suppress(BlockingIOError):
                left = left[os.write(self._requests.fileno(), left) :]

    def _read(self, count: int, deadline: float) -> bytearray:
        data, got = bytearray(count), 0
        while got < count:
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            taken = os.readv(self._answers.fileno(), [memoryview(data)[got:]])
            if not taken:
                raise EOFError
            got += taken
        return data


def _end_of(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"


class Decoders:
    """Decoder processes for a while, `limit` at most; whatever they are at is given up when it ends.

    More threads than `limit` may ask: a place that a decoder cannot read is read here, before one is waited for.
    """

    def __init__(self, limit: int = 1) -> None:
        self._slots = threading.Semaphore(limit)
        self._busy: set[Decoder] = set()
        self._ended = False
        self._lock = threading.Lock()

    def load(self, place: Place, *, key: bytes | None, transforms: Sequence[str | None]) -> list[Loaded]:
        """Return what `Decoder.load` does."""
        data = None
        if not place.is_direct:
            try:
                data = place.read()
            except OSError as exc:
                return [("read", exc.strerror or str(exc))] * len(transforms)
            if self._ended:
                return [("limit", "given up")] * len(transforms)
        with self._slots:
            return self._load(place, data, key, transforms)

    def _load(
        self, place: Place, data: bytes | None, key: bytes | None, transforms: Sequence[str | None]
    ) -> list[Loaded]:
        decoder = _take()
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
            _idle.append(decoder) if reusable else decoder.close()

    def give_up(self) -> None:
        """End every process that is at work: the threads that wait for them return at once."""
        with self._lock:
            self._ended = True
            for decoder in self._busy:
                decoder.interrupt()


def start_decoders(count: int, images: int) -> None:
    """Start processes for the decoding of so many images, and do not wait for them."""
    patience = 0 if images >= count * PATIENCE else PATIENCE
    _starting.extend(Decoder(patience, ahead=True) for _ in range(count - len(_starting) - len(_idle)))


def _take() -> Decoder:
    with suppress(IndexError):
        return _idle.pop()
    while _starting:
        with suppress(IndexError, EmbedpipeError):  # one that was ended while it started is no loss
            (decoder := _starting.pop()).await_start()
            return decoder
    return Decoder()


@atexit.register
def close_decoders() -> None:
    """End all idle decoder processes; the next image starts new ones."""
    for decoders in (_idle, _starting):
        while decoders:
            decoders.pop().close()


def _leave_decoders_to_the_parent() -> None:
    for decoders in (_idle, _starting):
        while decoders:
            decoders.pop().forget()


os.register_at_fork(after_in_child=_leave_decoders_to_the_parent)

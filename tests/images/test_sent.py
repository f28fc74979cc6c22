"""Images that a decoder process cannot read itself: read here, sent through its pipe."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from embedpipe.data import ByteSource
from embedpipe.images import Transform, decode_image, image_batches
from embedpipe.images._isolation import Decoder, Limits, close_decoders
from tests.conftest import write_photo

TRANSFORM = Transform((16, 16), 16)
LARGE = os.urandom(40 << 20)  # more than any pipe holds


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    close_decoders()
    yield
    close_decoders()


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return write_photo(tmp_path / "x.png", (9, 9, 9), 0).read_bytes()


def children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def test_bytes_that_are_sent_are_decoded_and_checked(data: bytes) -> None:
    decoder, place = Decoder(), ByteSource("memory://x.png")
    (pixels,) = decoder.load(place, key=hashlib.sha256(data).digest(), transforms=[None], data=data)
    np.testing.assert_array_equal(pixels, np.asarray(decode_image(data)))
    for sent, key, expected in (
        (data, bytes(32), ("read", "changed while reading")),
        (LARGE, None, "decode"),
        (b"", None, "decode"),
    ):
        (found,) = decoder.load(place, key=key, transforms=[None], data=sent)
        assert found == expected or found[0] == expected
    (pixels,) = decoder.load(place, key=None, transforms=[None], data=data)  # the pipe is still in step
    assert isinstance(pixels, np.ndarray)
    decoder.close()


def test_a_decoder_that_does_not_take_the_bytes_ends_at_the_time_limit() -> None:
    before = children()
    decoder = Decoder(Limits(time_s=1.0))
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    assert decoder.load(ByteSource("memory://x"), key=None, transforms=[None], data=LARGE) == [
        ("limit", "took longer than 1 s")
    ]
    assert time.monotonic() - start < 3


def test_a_decoder_that_dies_while_bytes_are_sent_costs_one_image() -> None:
    before = children()
    decoder = Decoder()
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    assert decoder.load(ByteSource("memory://x"), key=None, transforms=[None], data=LARGE) == [
        ("limit", "the decoder died of SIGKILL")
    ]


def test_many_are_read_at_once_by_few_decoders(data: bytes) -> None:
    system = fsspec.filesystem("memory")
    system.pipe({f"/many/{n}.png": data for n in range(40)})
    before = children()
    items = [(b"%d" % n, ByteSource(f"memory://many/{n}.png")) for n in range(40)]
    keyed = [(hashlib.sha256(data).digest(), place) for _, place in items]
    seen = 0
    for batch in image_batches(
        [*keyed, (bytes(32), ByteSource("memory://many/gone.png"))], [TRANSFORM], batch_size=16, workers=1
    ):
        assert len(children() - before) <= 1
        seen += len(batch)
        assert all((one.stage, one.reason) == ("read", "no such file") for one in batch.failures)
    assert (seen, len(batch.failures)) == (40, 1)


def test_who_stops_early_leaves_no_thread(data: bytes) -> None:
    fsspec.filesystem("memory").pipe("/early/x.png", data)
    before = threading.active_count()
    batches = image_batches([(None, ByteSource("memory://early/x.png"))] * 99, [TRANSFORM], batch_size=2, workers=2)
    next(batches)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5
    assert threading.active_count() <= before

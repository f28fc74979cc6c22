"""Decoder processes: what dies, hangs or eats memory costs one image, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedpipe.data import ByteSource
from embedpipe.errors import EmbedpipeError
from embedpipe.images import Transform, decode_image, image_batches, start_decoders
from embedpipe.images._isolation import Decoder, Decoders, Limits, close_decoders

TRANSFORM = Transform((16, 16), 16)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    close_decoders()
    yield
    close_decoders()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    return tmp_path / "good.png"


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """An image that takes seconds to decode."""
    Image.new("RGB", (12000, 12000)).save(tmp_path / "slow.png", compress_level=1)
    return tmp_path / "slow.png"


def children(parent: int | str = "self") -> set[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true: object, limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_pixels_are_those_of_this_process(good: Path) -> None:
    decoders = Decoders()
    cropped, whole = decoders.load(ByteSource.from_path(good), key=None, transforms=[TRANSFORM.text, None])
    image = decode_image(good.read_bytes())
    np.testing.assert_array_equal(cropped, TRANSFORM.window(image))
    np.testing.assert_array_equal(whole, np.asarray(image))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_decoder_that_dies_costs_one_image(good: Path, slow: Path, number: signal.Signals) -> None:
    before = children()

    def shoot() -> None:
        wait_until(lambda: children() - before)
        (pid,) = children() - before
        wait_until(lambda: b"_serving" in Path(f"/proc/{pid}/cmdline").read_bytes() and resident_mb(pid) > 150)
        os.kill(pid, number)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    items = [(b"", good), (None, slow), (None, good)]
    (batch,) = image_batches([(None, p) for _, p in items], [TRANSFORM], batch_size=3, workers=1)
    shooter.join()
    assert len(batch.keys) == 2
    assert [(failed.stage, failed.reason) for failed in batch.failures] == [
        ("limit", f"the decoder died of {number.name}")
    ]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_a_hang_ends_at_the_time_limit(good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    items = [(None, tmp_path / "pipe.png"), (None, good)]
    start = time.monotonic()
    (batch,) = image_batches(items, [TRANSFORM], batch_size=2, workers=2, limits=Limits(time_s=1.0))
    assert [failed.reason for failed in batch.failures] == ["took longer than 1 s"]
    assert len(batch.keys) == 1
    assert time.monotonic() - start < 5


def test_memory_is_limited(good: Path, slow: Path) -> None:
    limits = Limits(memory_bytes=500 << 20)
    (batch,) = image_batches([(None, slow), (None, good)], [TRANSFORM], batch_size=2, workers=1, limits=limits)
    assert [(failed.stage, failed.reason) for failed in batch.failures] == [
        ("limit", "needs more than 500 MiB of memory")
    ]
    assert len(batch.keys) == 1


def test_idle_decoders_with_other_limits_are_not_reused(good: Path, slow: Path) -> None:
    list(image_batches([(None, good)], [TRANSFORM], batch_size=1, workers=1))
    limits = Limits(memory_bytes=500 << 20)
    (batch,) = image_batches([(None, slow)], [TRANSFORM], batch_size=1, workers=1, limits=limits)
    assert [failed.reason for failed in batch.failures] == ["needs more than 500 MiB of memory"]
    (batch,) = image_batches([(None, slow)], [TRANSFORM], batch_size=1, workers=1)
    assert not batch.failures


@pytest.mark.slow
def test_the_largest_image_allowed_fits_the_limit(tmp_path: Path) -> None:
    Image.new("RGBA", (13377, 13377), (9, 9, 9, 9)).save(tmp_path / "large.png", compress_level=1)
    (batch,) = image_batches([(None, tmp_path / "large.png")], [TRANSFORM], batch_size=1, workers=1)
    assert not batch.failures


def test_decoders_stay_for_the_next_image_and_leave_when_told(good: Path) -> None:
    before = children()
    for _ in range(3):
        list(image_batches([(None, good)] * 4, [TRANSFORM], batch_size=4, workers=2))
    assert 1 <= len(children() - before) <= 2
    close_decoders()
    assert children() == before


@pytest.mark.parametrize("busy", [False, True])
def test_none_outlives_its_parent(slow: Path, good: Path, busy: bool) -> None:
    code = (
        "import sys; from embedpipe.data import ByteSource\n"
        "from embedpipe.images._isolation import Decoder\n"
        "decoder = Decoder()\n"
        "decoder.load(ByteSource.from_path(sys.argv[1]), key=None, transforms=[None])\n"
        "print('loaded', flush=True)\n"
        "if len(sys.argv) > 2:\n"
        "    decoder.load(ByteSource.from_path(sys.argv[2]), key=None, transforms=[None])\n"
        "else:\n"
        "    sys.stdin.read()\n"
    )
    arguments = [str(good), str(slow)] if busy else [str(good)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loaded\n"
    (decoder,) = children(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not is_running(decoder), limit_s=5)


def test_signals_to_the_whole_group_are_the_parents_to_answer(good: Path) -> None:
    before = children()
    decoder = Decoder()
    (pid,) = children() - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert isinstance(decoder.load(ByteSource.from_path(good), key=None, transforms=[None])[0], np.ndarray)
    decoder.close()


def test_a_fork_does_not_share_the_decoders_of_its_parent(good: Path) -> None:
    list(image_batches([(None, good)], [TRANSFORM], batch_size=1, workers=1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            (batch,) = image_batches([(None, good)], [TRANSFORM], batch_size=1, workers=1)
            code = len(batch.failures) + (not children())  # it has started one of its own
            close_decoders()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (batch,) = image_batches([(None, good)], [TRANSFORM], batch_size=1, workers=1)
    assert not batch.failures


def test_a_decoder_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EmbedpipeError, match="a decoder process does not start"):
        Decoder()


def test_paths_are_those_of_this_process_now(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    monkeypatch.chdir(tmp_path)
    assert isinstance(decoder.load(ByteSource.from_path(good.name), key=None, transforms=[None])[0], np.ndarray)
    decoder.close()


def test_who_stops_early_does_not_wait_for_a_slow_image(good: Path, slow: Path) -> None:
    batches = image_batches([(None, good), (None, slow), (None, slow)], [TRANSFORM], batch_size=1, workers=2)
    next(batches)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 0.5  # the slow one takes more than a second


def test_what_is_asked_for_after_the_end_is_given_up_at_once(slow: Path) -> None:
    decoders = Decoders()
    decoders.give_up()
    start = time.monotonic()
    assert decoders.load(ByteSource.from_path(slow), key=None, transforms=[None]) == [("limit", "given up")]
    assert time.monotonic() - start < 0.8  # the image takes more than a second


def test_decoders_that_load_the_compiled_resize_give_the_same_pixels(good: Path) -> None:
    transform = Transform((16, 16), 24)
    plain, swift = Decoder(compiled_after=10**9), Decoder(compiled_after=0)
    try:
        wait_until(lambda: has_llvm(swift), 60)
        assert not has_llvm(plain)
        asked = {"key": None, "transforms": [transform.text]}
        [expected], [found] = (one.load(ByteSource.from_path(good), **asked) for one in (plain, swift))
        assert np.array_equal(expected, found)
        assert np.array_equal(expected, transform.window(decode_image(good.read_bytes())))
    finally:
        plain.close()
        swift.close()


def has_llvm(decoder: Decoder) -> bool:
    return "llvmlite" in Path(f"/proc/{decoder._process.pid}/maps").read_text()


def test_decoders_are_started_ahead_and_then_used(good: Path) -> None:
    others = children()
    start_decoders(2, images=10)
    before = children() - others
    assert len(before) == 2
    start_decoders(2, images=10)
    list(image_batches([(None, good)] * 4, [TRANSFORM], batch_size=2, workers=2))
    assert children() - others == before


@pytest.mark.parametrize("trouble", ["ImportError('none')", "RuntimeError('cannot cache function')"])
def test_a_decoder_without_a_working_numba_resizes_by_pillow(
    trouble: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numba.py").write_text(f"open({str(tmp_path / 'tried')!r}, 'w').close()\nraise {trouble}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    decoder = Decoder(compiled_after=0)
    try:
        wait_until(lambda: (tmp_path / "tried").exists(), 30)
        [found] = decoder.load(ByteSource.from_path(good), key=None, transforms=[TRANSFORM.text])
        assert np.array_equal(found, TRANSFORM.window(decode_image(good.read_bytes())))
        assert decoder.alive
    finally:
        decoder.close()

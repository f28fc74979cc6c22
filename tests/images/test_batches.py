"""Batches: full, in order, in bounded memory, and honest about failures."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedpipe.images import Transform, decode_image, image_batches

TRANSFORM = Transform((16, 16), 16)


@pytest.fixture
def items(tmp_path: Path) -> list[tuple[bytes, Path]]:
    """Ten images, the number i as their grey value 20 * i."""
    found = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 18), (20 * i,) * 3).save(path)
        found.append((hashlib.sha256(path.read_bytes()).digest(), path))
    return found


def test_batches_are_full_in_order_and_exact(items) -> None:
    batches = list(image_batches(items, [TRANSFORM], batch_size=4, workers=3))
    assert [len(batch.keys) for batch in batches] == [4, 4, 2]
    assert [key for batch in batches for key in batch.keys] == [key for key, _ in items]
    assert not any(batch.failures for batch in batches)
    pixels = np.concatenate([batch.images[0] for batch in batches])
    expected = torch.stack([TRANSFORM(decode_image(path.read_bytes())) for _, path in items])
    assert pixels.dtype == np.uint8
    assert torch.equal(TRANSFORM.normalise(pixels), expected)


def test_failures_do_not_thin_a_batch(items) -> None:
    items[0][1].unlink()
    items[1][1].write_bytes(b"no image")
    broken = hashlib.sha256(b"no image").digest()
    items[1] = (broken, items[1][1])
    items[2][1].write_bytes(b"something else")
    batches = list(image_batches(items, [TRANSFORM], batch_size=4, workers=2))
    assert [len(batch.keys) for batch in batches] == [4, 3]
    failures = batches[0].failures
    assert [(failed.key, failed.stage) for failed in failures] == [
        (items[0][0], "read"),
        (broken, "decode"),
        (items[2][0], "read"),
    ]
    assert failures[0].reason == "No such file or directory"
    assert "not an image" in failures[1].reason
    assert failures[2].reason == "changed while reading"


def test_only_failures(tmp_path: Path) -> None:
    (batch,) = image_batches([(None, tmp_path / "no.png")], [TRANSFORM], batch_size=2, workers=1)
    assert len(batch) == 0
    assert batch.keys == []
    assert len(batch.failures) == 1


def test_nothing_in_nothing_out() -> None:
    assert list(image_batches([], [TRANSFORM], batch_size=2, workers=1)) == []


def test_without_a_key_nothing_is_checked(items) -> None:
    unchecked = [(None, path) for _, path in items]
    (batch,) = image_batches(unchecked, [TRANSFORM], batch_size=10, workers=2)
    assert batch.keys == [None] * 10


def test_the_window_is_bounded(items) -> None:
    taken = 0

    def endless() -> Iterator[tuple[bytes, Path]]:
        nonlocal taken
        while True:
            taken += 1
            yield items[taken % 10]

    batches = image_batches(endless(), [TRANSFORM], batch_size=4, workers=2)
    for _ in range(3):
        next(batches)
    assert taken <= 3 * 4 + 16 + 2
    batches.close()


def test_threads_leave_when_the_reader_stops_early(items) -> None:
    batches = image_batches(items, [TRANSFORM], batch_size=2, workers=2)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_decoding_goes_on_in_several_threads(items) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def transform(image: Image.Image) -> torch.Tensor:
        meeting.wait()
        return TRANSFORM(image)

    assert len(list(image_batches(items, [transform], batch_size=5, workers=2))) == 2


def test_an_error_of_the_transform_itself_is_raised(items) -> None:
    def broken(image: Image.Image) -> torch.Tensor:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(image_batches(items, [broken], batch_size=2, workers=2))


def test_an_image_may_fail_in_one_transform_alone(tmp_path: Path) -> None:
    """So long and thin that its short side cannot be made 64 pixels, but can be cut down to 16."""
    Image.new("RGB", (60_000, 1)).save(tmp_path / "thin.png")
    large, small = Transform((64, 64), 64), Transform((16, 16), (16, 16), resize_mode="squash")
    (batch,) = image_batches([(None, tmp_path / "thin.png")], [large, small], batch_size=2, workers=1)
    assert batch.keys == [None]
    assert [(failed.key, failed.stage, failed.transform) for failed in batch.failures] == [(None, "decode", 0)]
    assert [images.shape for images in batch.images] == [(1, 64, 64, 3), (1, 16, 16, 3)]

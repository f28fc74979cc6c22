"""The compiled resize gives Pillow's bits, whatever the sizes, and leaves to Pillow what it does otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from embedpipe.images import Transform
from embedpipe.images._resampling import COMPARISONS, FILTERS, Resampler, resize_part

SIDES = st.integers(1, 400)


def pixels(width: int, height: int, *, hard: bool = False) -> Image.Image:
    random = np.random.default_rng(width * height)
    values = random.integers(0, 2, (height, width, 3)) * 255 if hard else random.integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(sorted(FILTERS)), st.booleans(), st.data())
@example(4000, 30, 300, 2, "bicubic", True, None)
@example(256, 600, 64, 150, "bilinear", True, None)  # Pillow 13 takes columns first
def test_any_part_of_any_size(
    width: int, height: int, new_width: int, new_height: int, name: str, hard: bool, data: st.DataObject | None
) -> None:
    image, size = pixels(width, height, hard=hard), (new_width, new_height)
    left = data.draw(st.integers(0, new_width - 1)) if data else new_width // 4
    top = data.draw(st.integers(0, new_height - 1)) if data else new_height // 4
    box = (left, top, new_width - left, new_height - top)
    resample = Resampler()
    found = resample(image, size=size, box=box, interpolation=name)
    assert resample.agrees
    whole = np.asarray(image.resize(size, Image.Resampling[name.upper()]))
    assert found is None or np.array_equal(found, whole[top:, left:])
    assert found is not None or height - new_height > max(0, 2 * (width - new_width))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1, 1000), (3000, 2000), (256, 256), (130, 700)])
@pytest.mark.parametrize(
    "transform",
    [
        Transform((224, 224), 256),
        Transform((224, 224), 235, interpolation="bicubic"),
        Transform((224, 224), (224, 224), resize_mode="squash"),
        Transform((224, 224), (240, 224)),
        Transform((224, 224), (224, 224), resize_mode="border"),
        Transform((224, 224), 100),  # smaller than the crop: padded
        Transform((224, 224), 256, interpolation="lanczos"),
        Transform((224, 224), 256, augment="standard", seed=1, view=1),
    ],
    ids=lambda t: f"{t.resize_mode}-{t.resize_size}-{t.interpolation}-{t.augment}",
)
def test_a_window_is_the_same(transform: Transform, size: tuple[int, int]) -> None:
    image = pixels(*size)
    if size == (1, 1000) and transform.resize_mode == "short":
        transform = Transform((8, 8), 9)
    assert np.array_equal(transform.window(image, "k", Resampler()), transform.window(image, "k"))


def test_most_windows_of_photos_are_resized_here() -> None:
    seen: list[tuple[int, int]] = []

    class Counted(Resampler):
        def __call__(self, image: Image.Image, **asked: object) -> np.ndarray | None:
            found = super().__call__(image, **asked)  # type: ignore[arg-type]
            if found is not None:
                seen.append(image.size)
            return found

    resample = Counted()
    for size in ((500, 375), (375, 500), (640, 480), (1024, 768)):
        Transform((224, 224), 256).window(pixels(*size), "", resample)
    assert seen == [(500, 375), (375, 500), (640, 480), (1024, 768)]


def test_what_differs_from_pillow_is_never_used() -> None:
    def slightly_off(*arguments: Any) -> np.ndarray:
        resized = resize_part(*arguments)
        resized[0, 0, 0] ^= 1
        return resized

    resample, image = Resampler(slightly_off), pixels(50, 40)
    arguments: dict[str, Any] = {"size": (20, 16), "box": (0, 0, 20, 16), "interpolation": "bilinear"}
    assert resample(image, **arguments) is None
    assert not resample.agrees
    assert resample(image, **arguments) is None


def test_comparisons_end(monkeypatch: pytest.MonkeyPatch) -> None:
    resample, image = Resampler(), pixels(50, 40)
    calls = 0
    resize = Image.Image.resize

    def counted(*args: object, **more: object) -> Image.Image:
        nonlocal calls
        calls += 1
        return resize(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", counted)
    for _ in range(COMPARISONS + 5):
        resize_part(image, (20, 16), (0, 0, 20, 16), "bilinear")
        assert resample(image, size=(20, 16), box=(0, 0, 20, 16), interpolation="bilinear") is not None
    assert calls == COMPARISONS

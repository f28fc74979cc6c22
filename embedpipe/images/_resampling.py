"""Pillow's resize, compiled and limited to the part that a crop keeps: the same bits in about half the time.

Pillow resizes along rows first, then along columns, with weights that are integer multiples of 2^-22, and rounds to 8 bits after
each pass, so any part of the resized image can be computed alone. (Pillow 13 resizes along columns first if the height shrinks by
more than twice as many pixels as the width; such images are left to Pillow.) Decoders load this module after some images.

>>> resample = Resampler()
>>> resample(image, size=(341, 256), box=(58, 16, 224, 224), interpolation="bilinear").shape
(224, 224, 3)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numba
import numpy as np
from PIL import Image

BITS = 22  # of a weight, after the point
HALF = np.int32(1 << (BITS - 1))
BLACK, WHITE = np.int32(0), np.int32(255)
NUMBA = {"nogil": True, "fastmath": True, "boundscheck": False, "error_model": "numpy", "cache": True}
COMPARISONS = 8  # images that are resized by Pillow too


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, 1 - x, 0.0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution with a = -1/2. Source: Keys, IEEE Trans. ASSP 29 (1981)."""
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _cubic),
}


class Resampler:
    """Resize the part of images that a crop keeps.

    The first images are resized by Pillow as well. If one differs in a bit, as it may with another version of Pillow,
    `agrees` becomes False, and all further images are left to Pillow.

    resize : callable    computes the part, see `resize_part`
    """

    def __init__(self, resize: Callable[..., np.ndarray] | None = None) -> None:
        self.agrees = True
        self._resize, self._comparisons_left = resize or resize_part, COMPARISONS

    def __call__(
        self, image: Image.Image, *, size: tuple[int, int], box: tuple[int, int, int, int], interpolation: str
    ) -> np.ndarray | None:
        """Return uint8 (height, width, 3) of an RGB image, or None if Pillow has to resize it.

        Parameters
        ----------
        size : (width, height)                 of the whole image, resized
        box : (left, top, width, height)       the part of it to compute
        """
        shrink = image.height - size[1]
        if not self.agrees or interpolation not in FILTERS or shrink > max(0, 2 * (image.width - size[0])):
            return None
        resized = self._resize(image, size, box, interpolation)
        if self._comparisons_left:
            self._comparisons_left -= 1
            left, top, width, height = box
            whole = np.asarray(image.resize(size, Image.Resampling[interpolation.upper()]))
            self.agrees = np.array_equal(resized, whole[top : top + height, left : left + width])
        return resized if self.agrees else None


def resize_part(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], interpolation: str
) -> np.ndarray:
    """Return uint8 (height, width, 3): the box of an RGB image that is resized to `size`; see `Resampler`."""
    left, top, width, height = box
    lefts, across = filter_weights(image.width, size[0], left, width, interpolation)
    tops, down = filter_weights(image.height, size[1], top, height, interpolation)
    first = int(lefts[0]), int(tops[0])
    part = image.crop((*first, int(lefts[-1]) + across.shape[1], int(tops[-1]) + down.shape[1]))
    pixels = np.frombuffer(part.tobytes("raw", "RGBX"), np.uint32).reshape(part.height, part.width)
    rows = np.empty((part.height, width), np.uint32)
    _resize_across(pixels, lefts - first[0], across, rows)
    resized = np.empty((height, width, 3), np.uint8)
    _resize_down(rows.view(np.uint8), tops - first[1], down, resized)
    return resized


@lru_cache(256)
def filter_weights(
    length: int, resized: int, first: int, count: int, interpolation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first source pixel of each resized pixel, int64 (count,), and the filter weights, int32 (count, T).

    Parameters
    ----------
    length, resized : int    of a row or column before and after resizing, px
    first, count : int       range of the resized pixels
    """
    support, kernel = FILTERS[interpolation]
    scale = length / resized
    reach = support * max(scale, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * scale
    begins = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + reach + 0.5).astype(np.int64), length)
    places = np.arange(min(math.ceil(reach) * 2 + 1, length))
    begins = np.minimum(begins, length - len(places))  # pixels before it have weight 0
    away = np.abs((begins[:, None] + places - centres[:, None] + 0.5) * (1 / max(scale, 1.0)))
    inside = begins[:, None] + places < ends[:, None]
    shares = np.where(inside, kernel(away), 0.0)
    total = np.zeros(count)
    for share in shares.T:  # in this order: another one may round to another weight
        total += share
    shares /= np.where(total == 0, 1.0, total)[:, None]
    weights = (shares * (1 << BITS) + np.where(shares < 0, -0.5, 0.5)).astype(np.int32)
    used = np.flatnonzero(weights.any(axis=0))
    return begins, np.ascontiguousarray(weights[:, : used[-1] + 1])


@numba.njit("void(Array(uint32, 2, 'C', readonly=True), int64[::1], int32[:,::1], uint32[:,::1])", **NUMBA)  # type: ignore[untyped-decorator]
def _resize_across(pixels: np.ndarray, begins: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Fill rows of `out` (H, X) from rows of pixels (H, W), four bytes each."""
    height, width = out.shape
    many = weights.shape[1]
    spread = np.empty((many, 4 * width), np.int32)
    for x in range(width):
        for k in range(many):
            for byte in range(4):
                spread[k, 4 * x + byte] = weights[x, k]
    picked, sums = np.empty(width, np.uint32), np.empty(4 * width, np.int32)
    channels = picked.view(np.uint8)
    for y in range(height):
        row = pixels[y]
        for j in range(4 * width):
            sums[j] = HALF
        for k in range(many):
            for x in range(width):
                picked[x] = row[begins[x] + k]
            share = spread[k]
            for j in range(4 * width):
                sums[j] += np.int32(channels[j]) * share[j]
        found = out[y].view(np.uint8)
        for j in range(4 * width):
            found[j] = np.uint8(min(max(sums[j] >> BITS, BLACK), WHITE))


@numba.njit("void(uint8[:,::1], int64[::1], int32[:,::1], uint8[:,:,::1])", **NUMBA)  # type: ignore[untyped-decorator]
def _resize_down(rows: np.ndarray, begins: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Fill pixels of `out` (Y, X, 3) from rows (H, 4 X), every fourth byte of which is padding."""
    height, width, _ = out.shape
    sums = np.empty(4 * width, np.int32)
    for y in range(height):
        for j in range(4 * width):
            sums[j] = HALF
        for k in range(weights.shape[1]):
            row, share = rows[begins[y] + k], weights[y, k]
            for j in range(4 * width):
                sums[j] += np.int32(row[j]) * share
        for x in range(width):
            for channel in range(3):
                out[y, x, channel] = np.uint8(min(max(sums[4 * x + channel] >> BITS, BLACK), WHITE))

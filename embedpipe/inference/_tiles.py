"""Loops over pixels, compiled, once a machine: colours by a table, and Winograd's tiles and back.

A tile has 36 numbers a channel. Channels are taken 16 at a time, in vectors, so there are 16 of them, or a multiple.

Source of the tiles: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.3, F(4x4, 3x3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from embedpipe.compiling import BYTES, LANES, Memory, Vector, compiled, inlined

PIXELS, IMAGES, TILES, SIX = "uint8[:,:,:,::1]", "float32[:,:,:,::1]", "float32[:,:,::1]", "float32[:,::1]"
ZERO = np.float32(0)
STEP = BYTES * LANES


@compiled(f"void({PIXELS}, {SIX}, int64[::1], {IMAGES})")
def colour(pixels: np.ndarray, table: np.ndarray, channels: np.ndarray, images: np.ndarray) -> None:
    """Fill images (N, H, W, 3) with what a table (256, 3) has for pixels (N, H, W, 3), whose channels come in this order."""
    count, height, width, _ = pixels.shape
    for n in range(count):
        for y in range(height):
            for x in range(width):
                for k in range(3):
                    images[n, y, x, k] = table[pixels[n, y, x, channels[k]], k]


def _to_tile(a: Vector, b: Vector, c: Vector, d: Vector, e: Vector, f: Vector) -> Sequence[Vector]:
    """Return B^T of six pixels in a row."""
    even, odd, near, far = e - 4 * c, d - 4 * b, e - c, 2 * (d - b)
    return 4 * a - 5 * c + e, even + odd, even - odd, near + far, near - far, 4 * b - 5 * d + f


def _to_pixels(a: Vector, b: Vector, c: Vector, d: Vector, e: Vector, f: Vector) -> Sequence[Vector]:
    """Return A^T of six numbers of a tile: four pixels in a row."""
    ones, twos, one, two = b + c, d + e, b - c, d - e
    return a + ones + twos, one + 2 * two, ones + 4 * twos, one + 8 * two + f


def _both_ways(turn: Callable[..., Sequence[Vector]]) -> Callable[..., None]:
    """Return a call that turns six rows of six vectors along columns and rows; steps between them are in bytes."""

    def write(memory: Memory, source: Any, down: Any, across: Any, target: Any, row: Any, column: Any) -> None:
        columns = [turn(*(memory[source, (y, down), (x, across)] for y in range(6))) for x in range(6)]
        for y, line in enumerate(zip(*columns, strict=True)):
            for x, vector in enumerate(turn(*line)):
                memory[target, (y, row), (x, column)] = vector

    return inlined(write)


_spread, _gather = _both_ways(_to_tile), _both_ways(_to_pixels)


@inlined
def _finish(memory: Memory, sums: Any, bias: Any, target: Any, add: Any, relu: Any) -> None:
    """Write sums and their bias to `target`, added to what is there or not, rectified or not."""
    found = memory[sums] + memory[bias]
    found = found.if_not(add, found + memory[target])
    memory[target] = found.if_not(relu, found.at_least(0))


@compiled(f"void({IMAGES}, {TILES}, int64, int64, int64)")
def tile(images: np.ndarray, tiles: np.ndarray, first: int, rows: int, columns: int) -> None:
    """Fill tiles (T, 36, C), from number `first` on of the N x rows x columns that there are, from images (N, H, W, C).

    A tile is of 6x6 pixels, four from the next, with a black edge.
    """
    _, height, width, channels = images.shape
    edged, pixel = (
        np.empty((6, 6, channels + LANES), np.float32),
        BYTES * channels,
    )  # in steps that share a cache's sets
    for number in range(len(tiles)):
        image, place = divmod(first + number, rows * columns)
        top, left = 4 * (place // columns) - 1, 4 * (place % columns) - 1
        if top >= 0 and left >= 0 and top + 6 <= height and left + 6 <= width:
            source, across, down = images[image, top, left].ctypes.data, pixel, width * pixel
        else:
            for y in range(6):
                for x in range(6):
                    if 0 <= top + y < height and 0 <= left + x < width:
                        for k in range(channels):
                            edged[y, x, k] = images[image, top + y, left + x, k]
                    else:
                        for k in range(channels):
                            edged[y, x, k] = ZERO
            source, across, down = edged.ctypes.data, pixel + STEP, 6 * (pixel + STEP)
        target = tiles[number].ctypes.data
        for k in range(0, pixel, STEP):
            _spread(source + k, down, across, target + k, 6 * pixel, pixel)


@compiled(f"void({TILES}, float32[::1], {IMAGES}, int64, int64, int64, int64, int64)")
def untile(
    tiles: np.ndarray, bias: np.ndarray, images: np.ndarray, first: int, rows: int, columns: int, add: int, relu: int
) -> None:
    """Fill images (N, H, W, C), or add to them, where tiles (T, 36, C), from number `first` on, have pixels; bias (C,)."""
    _, height, width, channels = images.shape
    sums, pixel = np.empty((4, 4, LANES), np.float32), BYTES * channels
    held = sums.ctypes.data
    for number in range(len(tiles)):
        image, place = divmod(first + number, rows * columns)
        top, left = 4 * (place // columns), 4 * (place % columns)
        source, target = tiles[number].ctypes.data, images[image, top, left].ctypes.data
        for k in range(0, pixel, STEP):
            _gather(source + k, 6 * pixel, pixel, held, 4 * STEP, STEP)
            for y in range(min(4, height - top)):
                for x in range(min(4, width - left)):
                    where = target + (y * width + x) * pixel + k
                    _finish(held + (4 * y + x) * STEP, bias.ctypes.data + k, where, add, relu)

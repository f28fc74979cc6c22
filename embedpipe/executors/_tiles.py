"""Loops over pixels, compiled, once a machine: colours by a table, images to Winograd's tiles, and tiles to images.

A tile has 36 numbers a channel. Every loop over channels is one of which LLVM makes vectors: few arrays, no branch.

Source of the tiles: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.3, F(4x4, 3x3).
"""

from __future__ import annotations

import numpy as np

from embedpipe.compiling import compiled

PIXELS, IMAGES, TILES, SIX = "uint8[:,:,:,::1]", "float32[:,:,:,::1]", "float32[:,:,::1]", "float32[:,::1]"
TWO, FOUR, FIVE, EIGHT, ZERO = (np.float32(number) for number in (2, 4, 5, 8, 0))


@compiled(f"void({PIXELS}, {SIX}, int64[::1], {IMAGES})")
def colour(pixels: np.ndarray, table: np.ndarray, channels: np.ndarray, images: np.ndarray) -> None:
    """Fill images (N, H, W, 3) with what a table (256, 3) has for pixels (N, H, W, 3), whose channels come in this order."""
    count, height, width, _ = pixels.shape
    for n in range(count):
        for y in range(height):
            for x in range(width):
                for k in range(3):
                    images[n, y, x, k] = table[pixels[n, y, x, channels[k]], k]


@compiled(f"void({SIX}, {TILES}, int64)")
def spread(six: np.ndarray, out: np.ndarray, place: int) -> None:
    """Write B^T of six rows of channels to out[:, place]."""
    a, b, c, d, e, f = six[0], six[1], six[2], six[3], six[4], six[5]
    channels = six.shape[1]
    for k in range(channels):
        out[0, place, k] = FOUR * a[k] - FIVE * c[k] + e[k]
    for k in range(channels):
        out[1, place, k] = (d[k] + e[k]) - FOUR * (b[k] + c[k])
    for k in range(channels):
        out[2, place, k] = FOUR * (b[k] - c[k]) - (d[k] - e[k])
    for k in range(channels):
        out[3, place, k] = TWO * (d[k] - b[k]) + (e[k] - c[k])
    for k in range(channels):
        out[4, place, k] = TWO * (b[k] - d[k]) + (e[k] - c[k])
    for k in range(channels):
        out[5, place, k] = FOUR * b[k] - FIVE * d[k] + f[k]


@compiled(f"void({SIX}, {TILES}, int64)")
def gather(six: np.ndarray, out: np.ndarray, place: int) -> None:
    """Write A^T of six rows of channels, four rows, to out[:, place]."""
    a, b, c, d, e, f = six[0], six[1], six[2], six[3], six[4], six[5]
    channels = six.shape[1]
    for k in range(channels):
        out[0, place, k] = a[k] + (b[k] + c[k]) + (d[k] + e[k])
    for k in range(channels):
        out[1, place, k] = (b[k] - c[k]) + TWO * (d[k] - e[k])
    for k in range(channels):
        out[2, place, k] = (b[k] + c[k]) + FOUR * (d[k] + e[k])
    for k in range(channels):
        out[3, place, k] = (b[k] - c[k]) + EIGHT * (d[k] - e[k]) + f[k]


@compiled(f"void({IMAGES}, {TILES}, int64, int64, int64)")
def tile(images: np.ndarray, tiles: np.ndarray, first: int, rows: int, columns: int) -> None:
    """Fill tiles (T, 36, C), from number `first` on of the N x rows x columns that there are, from images (N, H, W, C).

    A tile is of 6x6 pixels, four from the next, with a black edge.
    """
    _, height, width, channels = images.shape
    pixels = np.empty((6, channels), np.float32)
    half = np.empty((6, 6, channels), np.float32)
    for number in range(len(tiles)):
        image, place = divmod(first + number, rows * columns)
        top, left = 4 * (place // columns) - 1, 4 * (place % columns) - 1
        for x in range(left, left + 6):
            for y in range(top, top + 6):
                if 0 <= y < height and 0 <= x < width:
                    for k in range(channels):
                        pixels[y - top, k] = images[image, y, x, k]
                else:
                    for k in range(channels):
                        pixels[y - top, k] = ZERO
            spread(pixels, half, x - left)
        found = tiles[number].reshape(6, 6, channels)
        for row in range(6):
            spread(half[row], found, row)


@compiled(f"void({TILES}, float32[::1], {IMAGES}, int64, int64, int64, boolean, boolean)")
def untile(
    tiles: np.ndarray, bias: np.ndarray, images: np.ndarray, first: int, rows: int, columns: int, add: bool, relu: bool
) -> None:
    """Fill images (N, H, W, C), or add to them, where tiles (T, 36, C), from number `first` on, have pixels; bias (C,)."""
    _, height, width, channels = images.shape
    half = np.empty((4, 6, channels), np.float32)
    pixels = np.empty((4, 1, channels), np.float32)
    for number in range(len(tiles)):
        image, place = divmod(first + number, rows * columns)
        top, left = 4 * (place // columns), 4 * (place % columns)
        for column in range(6):
            gather(tiles[number, 6 * column : 6 * column + 6], half, column)
        for y in range(top, min(top + 4, height)):
            gather(half[y - top], pixels, 0)
            for x in range(left, min(left + 4, width)):
                found, row = images[image, y, x], pixels[x - left, 0]
                if add:
                    for k in range(channels):
                        found[k] += row[k] + bias[k]
                else:
                    for k in range(channels):
                        found[k] = row[k] + bias[k]
                if relu:
                    for k in range(channels):
                        found[k] = max(found[k], ZERO)

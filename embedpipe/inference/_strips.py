"""Loops of a ResNet's stem, compiled, once a machine: 7x7 pixels of three channels, and the largest of 3x3, of every second.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.1, along columns alone: F(4, 4) of
the kernel's even rows and F(4, 3) of its odd ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.compiling import BYTES, LANES, Memory, Vector, compiled, inlined

Matrix = NDArray[np.float64]
IMAGES, MATRIX, WEIGHTS = "float32[:,:,:,::1]", "float32[:,::1]", "float32[:,:,::1]"
CHANNELS, TAPS = 3, 7  # of an image, of the kernel
SIDE, EDGE = 4, 3  # rows and pixels at a time, pixels around an image
EVEN, ODD = 7, 6  # sums of even rows and of odd rows, one a point; the last point has none of odd rows
REACH, WIDE = CHANNELS * TAPS, 64  # numbers under a row of the kernel; outputs at a time
STEP, ACROSS = BYTES * LANES, WIDE // LANES  # bytes of a vector, vectors
STRIP = 4  # times four pixels: while the weights of a sum are in the cache
NEXT, LINE = 2 * CHANNELS * BYTES, WIDE * BYTES  # bytes from a pixel to the next, of its outputs
SUM = SIDE * LINE  # bytes of a sum of four pixels
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, np.inf, 0.5)  # of Toom and Cook


@dataclass(frozen=True, eq=False)
class Turned:
    """Toom and Cook's matrices for four results of a kernel with so many taps, by n points of which one is infinity.

    pixels : (n, n)       B^T, of as many pixels in a row
    kernel : (n, taps)    G

    Source: Blahut, Fast Algorithms for Signal Processing, 5.2.
    """

    pixels: Matrix
    kernel: Matrix

    @classmethod
    def of(cls, points: tuple[float, ...], taps: int) -> Turned:
        finite = [point for point in points if np.isfinite(point)]
        pixels, kernel = np.zeros((len(points), len(points))), np.zeros((len(points), taps))
        for number, point in enumerate(points):
            others = [other for other in finite if other != point]
            polynomial = np.polynomial.polynomial.polyfromroots(others)
            pixels[number, : len(polynomial)] = polynomial
            if np.isfinite(point):
                kernel[number] = point ** np.arange(taps) / np.prod([point - other for other in others])
            else:
                kernel[number, -1] = 1
        return cls(pixels, kernel)


BY_EVEN, BY_ODD = Turned.of(POINTS, 4), Turned.of(POINTS[:ODD], 3)
FROM_EVEN, FROM_ODD = BY_EVEN.pixels.astype(np.float32), BY_ODD.pixels.astype(np.float32)


def _multiply(memory: Memory, rows: list[Any], weights: Any, target: Any) -> None:
    """Write four pixels of WIDE outputs: what is under the kernel in some rows, times its numbers."""
    sums: dict[tuple[int, int], Vector] = {}
    for number, row in enumerate(rows):
        for k in range(REACH):
            line = [memory[weights, (number * REACH + k, LINE), (v, STEP)] for v in range(ACROSS)]
            pixels = [memory.all((row, (x, NEXT), (k, BYTES))) for x in range(SIDE)]
            for (x, pixel), (v, weight) in product(enumerate(pixels), enumerate(line)):
                sums[x, v] = sums[x, v] + pixel * weight if sums.get((x, v)) else pixel * weight
    for (x, v), vector in sums.items():
        memory[target, (x, LINE), (v, STEP)] = vector


@inlined
def _multiply_two(memory: Memory, even: Any, odd: Any, weights: Any, target: Any) -> None:
    _multiply(memory, [even, odd], weights, target)


@inlined
def _multiply_one(memory: Memory, even: Any, weights: Any, target: Any) -> None:
    _multiply(memory, [even], weights, target)


@inlined
def _gather(memory: Memory, sums: Any, bias: Any, relu: Any, target: Any, down: Any) -> None:
    """Write A^T of the sums of all points: 16 outputs of a pixel in four rows."""
    zero, one, minus, two, far, last, half = (memory[sums, (point, STRIP * SUM)] for point in range(EVEN))
    ones, twos, odd, apart = one + minus, two + far, one - minus, two - far
    rows = zero + ones + twos + half, odd + 2 * apart + 0.5 * half, ones + 4 * twos + 0.25 * half
    for y, row in enumerate([*rows, odd + 8 * apart + 0.125 * half + last]):
        found = row + memory[bias]
        memory[target, (y, down)] = found.if_not(relu, found.at_least(0))


@inlined
def _largest(memory: Memory, above: Any, here: Any, below: Any, left: Any, right: Any, target: Any) -> None:
    """Write the largest of three rows at three columns; `left` and `right` are bytes from the middle one."""
    rows = [(row, (1, side)) if side else (row,) for row in (above, here, below) for side in (None, left, right)]
    found = memory[rows[0]]
    for place in rows[1:]:
        found = found.at_least(memory[place])
    memory[target] = found


@compiled(f"void({IMAGES}, int64, int64, {MATRIX})")
def _lift(images: np.ndarray, image: int, top: int, rows: np.ndarray) -> None:
    """Fill rows (13, 3 (W + 6)): sums of the even, then of the odd, rows of an image (N, H, W, 3) from `top` on."""
    height, length = images.shape[1], CHANNELS * images.shape[2]
    pixels = images.reshape(images.shape[0], height, length)
    edge = CHANNELS * EDGE
    for number in range(EVEN + ODD):
        first, matrix, row = (0, FROM_EVEN, number) if number < EVEN else (1, FROM_ODD, number - EVEN)
        rows[number, :] = 0
        for k in range(matrix.shape[1]):
            y, share = top + first + 2 * k, matrix[row, k]
            if 0 <= y < height and share != 0:
                for x in range(length):
                    rows[number, edge + x] += share * pixels[image, y, x]


@compiled(f"void({IMAGES}, {WEIGHTS}, float32[::1], int64, {IMAGES})")
def convolve(images: np.ndarray, weights: np.ndarray, bias: np.ndarray, relu: int, found: np.ndarray) -> None:
    """Fill found (N, H / 2, W / 2, O) from images (N, H, W, 3): H and W are multiples of 8, O is one of 64.

    weights : (O / 64, 273, 64)    the kernel, as `Stem` turns it
    """
    _, height, width, outputs = found.shape
    rows = np.empty((EVEN + ODD, CHANNELS * (images.shape[2] + 2 * EDGE)), np.float32)
    sums = np.empty((EVEN, STRIP, SIDE, WIDE), np.float32)
    held, step, pixel = sums.ctypes.data, BYTES * rows.shape[1], BYTES * outputs
    lifted = rows.ctypes.data
    for image in range(len(found)):
        for top in range(0, height, SIDE):
            _lift(images, image, 2 * top - EDGE, rows)
            for part in range(len(weights)):
                given, shift = weights[part].ctypes.data, bias.ctypes.data + part * LINE
                for left in range(0, width, STRIP * SIDE):
                    many = min(STRIP, (width - left) // SIDE)
                    for point in range(EVEN):
                        for some in range(many):
                            source = lifted + point * step + (left + some * SIDE) * NEXT
                            target = held + (point * STRIP + some) * SUM
                            matrix = given + point * 2 * REACH * LINE
                            if point < ODD:
                                _multiply_two(source, source + EVEN * step, matrix, target)
                            else:
                                _multiply_one(source, matrix, target)
                    for some in range(many):
                        for x in range(SIDE):
                            where = found[image, top, left + some * SIDE + x].ctypes.data + part * LINE
                            for v in range(0, LINE, STEP):
                                _gather(held + some * SUM + x * LINE + v, shift + v, relu, where + v, width * pixel)


@compiled(f"void({IMAGES}, {IMAGES})")
def pool(images: np.ndarray, found: np.ndarray) -> None:
    """Fill (N, H', W', C) with the largest of 3x3 pixels around every second one of images (N, H, W, C)."""
    count, height, width, channels = images.shape
    pixel = BYTES * channels
    for n in range(count):
        for y in range(found.shape[1]):
            above, below = max(2 * y - 1, 0), min(2 * y + 1, height - 1)  # an edge is as its neighbour: no larger
            for x in range(found.shape[2]):
                left, right = -pixel * (x > 0), pixel * (2 * x + 1 < width)
                rows = images[n, above, 2 * x].ctypes.data, images[n, below, 2 * x].ctypes.data
                here, target = images[n, 2 * y, 2 * x].ctypes.data, found[n, y, x].ctypes.data
                for k in range(0, pixel, STEP):
                    _largest(rows[0] + k, here + k, rows[1] + k, left, right, target + k)


@compiled(f"void({IMAGES}, {WEIGHTS}, float32[::1], int64, {IMAGES})")
def convolve_and_pool(images: np.ndarray, weights: np.ndarray, bias: np.ndarray, relu: int, found: np.ndarray) -> None:
    """Fill found (N, H / 4, W / 4, O) as `convolve` and `pool` do, image by image: what lies between stays in the cache."""
    room = np.empty((1, images.shape[1] // 2, images.shape[2] // 2, found.shape[3]), np.float32)
    for n in range(len(images)):
        convolve(images[n : n + 1], weights, bias, relu, room)
        pool(room, found[n : n + 1])

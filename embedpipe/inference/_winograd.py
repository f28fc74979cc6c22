"""Winograd's F(4x4, 3x3): a 3x3 convolution with a quarter of the multiplications.

Each tile of 6x6 pixels becomes 36 numbers a channel, each of these is multiplied by a matrix of its own, and the 36 sums become
4x4 pixels. The matrices are one convolution of oneDNN in 36 groups; what comes before and after is compiled in `_tiles`. In
float32 a result differs from the direct sum by up to 1e-5 of the largest.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.3.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor, nn

from embedpipe.inference._onednn import Convolution
from embedpipe.inference._suiting import GROUPS, Places, count_tiles
from embedpipe.inference._tiles import tile, untile

ROOM = 1 << 19  # numbers of tiles at a time, before and after: what stays in a core's cache
KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24  # G
_room = threading.local()


class Winograd(nn.Module):
    """A convolution of images of one size, with a rectifier after it or not.

    Parameters
    ----------
    weight : (O, C, 3, 3); bias : (O,) or None
    size : (N, C, H, W) of its input
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, size: tuple[int, ...], *, relu: bool) -> None:
        super().__init__()
        (outputs, channels), (count, _, height, width) = weight.shape[:2], size
        self._grid, self._relu = (count_tiles(height), count_tiles(width)), relu
        self._bias = np.zeros(outputs, np.float32) if bias is None else bias.numpy()
        self._all = count * self._grid[0] * self._grid[1]
        room = max(ROOM, GROUPS * channels * outputs)  # no less than the matrices, which pass by once for each part
        parts = -(-self._all // max(1, room // (GROUPS * (channels + outputs))))
        self._shape = (-(-self._all // parts), GROUPS, channels)
        rows = (1, GROUPS * channels, 1, self._shape[0])
        self._multiply = Convolution(_matrices(weight), None, rows, Places(groups=GROUPS))

    def forward(self, images: Tensor, total: Tensor | None = None) -> Tensor:
        """Return (N, O, H, W), channels last; added to `total`, in its memory, where that is given."""
        pixels, room = _channels_last(images), _memory(self._shape)
        shape = (*pixels.shape[:3], len(self._bias))
        found = torch.empty(shape) if total is None else _channels_last(total)
        given, tiles, target = pixels.numpy(), room.numpy(), found.numpy()
        for first in range(0, self._all, len(tiles)):
            count = min(len(tiles), self._all - first)
            tile(given, tiles[:count], first, *self._grid)
            sums = self._multiply(room[:count].view(1, 1, count, -1).permute(0, 3, 1, 2))
            sums = _channels_last(sums).view(count, GROUPS, -1)
            untile(sums.numpy(), self._bias, target, first, *self._grid, total is not None, self._relu)
        return found.permute(0, 3, 1, 2)


def _memory(shape: tuple[int, ...]) -> Tensor:
    """Return this thread's room for tiles, the same for every layer: it stays in the cache."""
    numbers: Tensor | None = getattr(_room, "numbers", None)
    if numbers is None or numbers.numel() < math.prod(shape):
        numbers = _room.numbers = torch.empty(math.prod(shape))
    return numbers[: math.prod(shape)].view(shape)


def _channels_last(images: Tensor) -> Tensor:
    """Return (N, H, W, C) in one piece: the same memory where it is so already."""
    return images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _matrices(weight: Tensor) -> Tensor:
    """Return G g G^T of a kernel, by columns, as a convolution in 36 groups: (36 O, C, 1, 1)."""
    kernel = torch.from_numpy(KERNEL)
    found = torch.einsum("ai,ocij,bj->aboc", kernel, weight.double(), kernel)
    return found.float().reshape(-1, weight.shape[1], 1, 1)

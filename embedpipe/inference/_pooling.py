"""The largest of 3x3 pixels around every second one, as in the stem of a ResNet; compiled in `_strips`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.compiling import LANES
from embedpipe.inference._strips import pool

OURS = [3, 3], [2, 2], [1, 1]  # kernel, stride and padding


class Pooling(nn.Module):
    """Max pooling of images whose channels are a multiple of 16."""

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, C, H', W'), channels last."""
        pixels = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        count, height, width, channels = pixels.shape
        found = torch.empty(count, -(-height // 2), -(-width // 2), channels)
        pool(pixels.numpy(), found.numpy())
        return found.permute(0, 3, 1, 2)


def can_pool(channels: int, *how: Any) -> bool:
    """Whether max pooling, with aten's arguments after the images, is ours."""
    return channels % LANES == 0 and tuple(how) == OURS

"""The first convolution of a ResNet, 7x7 at every second pixel of three channels, with half of the multiplications.

Four rows of the result take 13 rows of the image, 7 even and 6 odd ones of the kernel's. Their sums, one for each point of
Toom and Cook's, are convolved along the row alone, with sums of the kernel's rows; from these come the four rows. In float32 a
result differs from the direct sum by up to 2e-6 of the largest.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from embedpipe.inference._strips import BY_EVEN, BY_ODD, CHANNELS, REACH, SIDE, TAPS, WIDE, convolve, convolve_and_pool
from embedpipe.inference._suiting import Places

OURS = Places(stride=(2, 2), padding=(3, 3))


class Stem(nn.Module):
    """A convolution of images (N, 3, H, W), with a rectifier after it or not.

    Parameters
    ----------
    weight : (O, 3, 7, 7); bias : (O,) or None

    Attributes
    ----------
    pools : bool    whether the largest of 3x3 pixels around every second one is taken, too
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, relu: bool) -> None:
        super().__init__()
        self.pools = False
        outputs, self._relu = len(weight), relu
        self._bias = np.zeros(outputs, np.float32) if bias is None else bias.numpy()
        kernel = weight.double().permute(2, 3, 1, 0).reshape(TAPS, REACH, outputs).numpy()
        pairs = [np.tensordot(BY_EVEN.kernel, kernel[0::2], 1), np.tensordot(BY_ODD.kernel, kernel[1::2], 1)]
        lines = np.concatenate([*map(np.concatenate, zip(*pairs, strict=False)), pairs[0][-1]]).astype(np.float32)
        self._weights = np.ascontiguousarray(lines.reshape(-1, outputs // WIDE, WIDE).transpose(1, 0, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, O, H / 2, W / 2), half of that where it pools; channels last."""
        pixels = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        count, height, width, _ = pixels.shape
        step, run = (4, convolve_and_pool) if self.pools else (2, convolve)
        found = torch.empty(count, height // step, width // step, len(self._bias))
        run(pixels.numpy(), self._weights, self._bias, self._relu, found.numpy())
        return found.permute(0, 3, 1, 2)


def is_stem(weight: Tensor, places: Places, size: tuple[int, ...]) -> bool:
    """Whether a convolution of images of this size is ours, and its vectors are registers of this machine."""
    outputs, *kernel = weight.shape
    fits = outputs % WIDE == 0 and all(length % (2 * SIDE) == 0 for length in size[2:])
    return fits and kernel == [CHANNELS, TAPS, TAPS] and places == OURS and _has_wide_registers()


def _has_wide_registers() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()

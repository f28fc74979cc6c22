"""Which convolutions Winograd's tiles suit, and how much of a model they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedpipe.inference._folding import is_conv

if TYPE_CHECKING:
    from torch import Tensor

    from embedpipe.backbones import Joint


@dataclass(frozen=True)
class Places:
    """Which pixels a convolution takes, and in how many groups of channels."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


GROUPS, SIDE = 36, 4  # a tile's numbers a channel, and the pixels that it gives, in a row
OURS = Places(padding=(1, 1))


def count_tiles(length: int) -> int:
    """Return how many tiles a row or a column of pixels takes."""
    return -(-length // SIDE)


def suits(weight: Tensor, places: Places, size: tuple[int, ...]) -> bool:
    """Whether a convolution gains: 3x3 at every pixel, wide enough that tiles cost little, of sizes that tiles fill."""
    height, width = size[2:]
    wide = all(channels % 16 == 0 and channels >= 32 for channels in weight.shape[:2])
    tiled, direct = GROUPS * count_tiles(height) * count_tiles(width), 9 * height * width
    return places == OURS and tuple(weight.shape[2:]) == (3, 3) and wide and 2 * tiled <= direct


def tiled_share(joint: Joint) -> float:
    """Return the share of a joint's multiplications, in convolutions and linear layers, that tiles can take."""
    import torch
    from torch import nn

    whole = tiled = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal whole, tiled
        held: Any = module
        work = output.numel() * held.weight[0].numel()
        whole += work
        if is_conv(module) and not isinstance(held.padding, str):
            places = Places(held.stride, held.padding, held.dilation, held.groups)
            tiled += work * suits(held.weight, places, inputs[0].shape)

    parts = [one for one in joint.headless.model.modules() if is_conv(one) or isinstance(one, nn.Linear)]
    handles = [one.register_forward_hook(count) for one in parts]
    try:
        with torch.inference_mode():
            joint(joint.example(1))
    finally:
        for handle in handles:
            handle.remove()
    return tiled / max(whole, 1)

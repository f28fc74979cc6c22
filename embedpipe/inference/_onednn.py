"""oneDNN's convolutions, with the addition and the activation after them in the same call. The door to torch's own ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.inference._suiting import Places


def has_onednn() -> bool:
    """Tell whether this build of torch has oneDNN with what is needed here."""
    ours = hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    return ours and bool(torch._C._has_mkldnn)


class Convolution(nn.Module):
    """A convolution of images of one size.

    Parameters
    ----------
    weight : (O, C / groups, kh, kw); bias : (O,) or None
    size : (N, C, H, W) of its input
    activation : tuple    oneDNN's name of what follows, and its numbers; empty where nothing does
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        size: tuple[int, ...],
        places: Places,
        activation: tuple[Any, ...] = (),
    ) -> None:
        super().__init__()
        where = list(places.padding), list(places.stride), list(places.dilation), places.groups
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._held = reorder(weight.to_mkldnn(), *where, list(size)), bias, *where
        name, *numbers = activation or (None,)
        self._after = name, numbers, ""

    def forward(self, images: Tensor, total: Tensor | None = None) -> Tensor:
        """Return (N, O, H', W'); added to `total`, in its memory, where that is given."""
        ops, (name, *rest) = torch.ops.mkldnn, self._after
        if total is None:
            found: Tensor = ops._convolution_pointwise(images, *self._held, name or "none", *rest)
        else:
            found = ops._convolution_pointwise_.binary(total, images, *self._held, "add", 1.0, name, *rest)
        return found

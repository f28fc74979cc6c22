"""Joint: what several backbones have in common is computed once.

>>> [joint] = join([last, earlier])          # two layers of one model
>>> joint(pixels)                            # a feature of each
(tensor of (N, 512), tensor of (N, 256))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embedpipe.backbones._backbone import Backbone
from embedpipe.backbones._headless import Headless
from embedpipe.images import Transform


class Joint(nn.Module):
    """Images to the features of all backbones that share a model and a transform, in one pass.

    Takes uint8 (N, H, W, 3) where the transform is an `images.Transform`, which normalises here, on
    the device of the images; else float32 (N, 3, H, W).
    """

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        first = backbones[0]
        self.backbones = tuple(backbones)
        self.transform = first.transform
        groups = [backbone.module.taps for backbone in backbones]
        self.headless = first.module if len(groups) == 1 else Headless(first.module.model, *groups).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.transform, Transform):
            images = self.transform.normalise(images)
        features = self.headless(images)
        return features if isinstance(features, tuple) else (features,)

    def example(self, size: int) -> Tensor:
        """Return black images, a batch of `size`, as `forward` takes them."""
        height, width = self.backbones[0].image_size
        own = isinstance(self.transform, Transform)
        shape, dtype = ((height, width, 3), torch.uint8) if own else ((3, height, width), torch.float32)
        return torch.zeros((size, *shape), dtype=dtype)


def join(backbones: Sequence[Backbone]) -> list[Joint]:
    """Group backbones by model and transform, in the order of their first."""
    groups: dict[tuple[int, object], list[Backbone]] = {}
    for backbone in backbones:
        own = isinstance(backbone.transform, Transform)
        shared = backbone.transform if own else id(backbone.transform)
        groups.setdefault((id(backbone.module.model), shared), []).append(backbone)
    return [Joint(group) for group in groups.values()]

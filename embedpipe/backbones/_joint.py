"""Joint: what several backbones have in common is computed once.

>>> [joint] = join([last, earlier])          # two layers of one model
>>> joint(pixels)                            # a feature of each
(tensor of (N, 512), tensor of (N, 256))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.backbones._backbone import Backbone
from embedpipe.backbones._headless import Headless
from embedpipe.images import Transform


class Joint(nn.Module):
    """Images to the features of all backbones that share a model and a normalisation, in one pass.

    Takes uint8 (N, H, W, 3) where the transform is an `images.Transform`, which normalises here, on
    the device of the images; else float32 (N, 3, H, W).

    Attributes
    ----------
    groups : tuple    the taps of each feature that a pass gives
    """

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        self.first = backbones[0]
        self.groups = tuple(dict.fromkeys(backbone.module.taps for backbone in backbones))
        alone = len(self.groups) == 1
        self.headless = self.first.module if alone else Headless(self.first.module.model, *self.groups).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.first.transform, Transform):
            images = self.first.transform.normalise(images)
        return self.features(images)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features of images that are normalised already, float32 (N, 3, H, W)."""
        features = self.headless(images)
        return features if isinstance(features, tuple) else (features,)

    def output_of(self, backbone: Backbone) -> int:
        """Return which of the features is that of a backbone."""
        return self.groups.index(backbone.module.taps)

    def example(self, size: int) -> Tensor:
        """Return black images, a batch of `size`, as `forward` takes them."""
        height, width = self.first.image_size
        own = isinstance(self.first.transform, Transform)
        shape, dtype = ((height, width, 3), torch.uint8) if own else ((3, height, width), torch.float32)
        return torch.zeros((size, *shape), dtype=dtype)

    @property
    def spec(self) -> dict[str, Any]:
        """All that shapes what `forward` computes, JSON-able."""
        transform = self.first.transform
        return {
            **{name: self.first.spec[name] for name in ("schema", "source", "architecture", "build", "weights")},
            "groups": repr(self.groups),
            "colours": repr(transform.colours) if isinstance(transform, Transform) else None,
        }


def join(backbones: Sequence[Backbone]) -> tuple[list[Joint], list[int]]:
    """Group backbones by model and normalisation.

    Returns
    -------
    joints, and for each backbone the index of its own
    """
    groups: dict[tuple[int, object], list[int]] = {}
    for number, backbone in enumerate(backbones):
        transform = backbone.transform
        shared = transform.colours if isinstance(transform, Transform) else id(transform)
        groups.setdefault((id(backbone.module.model), shared), []).append(number)
    of = {number: joint for joint, numbers in enumerate(groups.values()) for number in numbers}
    joints = [Joint([backbones[number] for number in numbers]) for numbers in groups.values()]
    return joints, [of[number] for number in range(len(backbones))]

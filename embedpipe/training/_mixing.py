"""MixUp and CutMix, by torchvision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from embedpipe.training._plan import Plan

Batch = tuple[Tensor, Tensor]


def mixer(plan: Plan, n_classes: int) -> Callable[[Tensor, Tensor], Batch]:
    """Return a function that mixes pairs of a batch into images and soft labels float32 (n, n_classes).

    Source: Zhang et al., ICLR 2018 (mixup); Yun et al., ICCV 2019 (CutMix).
    """
    if not plan.mixup and not plan.cutmix:
        return lambda images, y: (images, y)
    from torchvision.transforms import v2

    kinds = ((plan.mixup, v2.MixUp), (plan.cutmix, v2.CutMix))
    mix: Callable[[Tensor, Tensor], Batch] = v2.RandomChoice([k(alpha=a, num_classes=n_classes) for a, k in kinds if a])

    def any_shape(images: Tensor, y: Tensor) -> Batch:
        """Mix activations that are no maps, tokens say, as if each were one."""
        mixed, soft = mix(images if images.ndim == 4 else images.flatten(1)[:, :, None, None], y)
        return mixed.view_as(images), soft

    return any_shape

"""Network: a backbone and a linear head as one trainable module, and what of it may move.

The finetuning deed enters here. Names in `unfrozen` are those of the network's state dict: `backbone.model.*` and `head.*`.

>>> network = Network(backbone.module, head)
>>> unfrozen, keep_eval = release(network, backbone, ["layer4"], bn="affine")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, frozen_modules, unfreeze_parameters
from embedpipe.heads import LinearHead

PREFIX = "backbone.model."
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Network(nn.Module):
    """images float32 (N, 3, H, W) -> logits (N, C)."""

    def __init__(self, module: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.backbone = module
        n_classes, feature_dim = head.weight.shape
        self.head = nn.Linear(feature_dim, n_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weight))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def to_head(self, classes: tuple[str, ...]) -> LinearHead:
        """Return the head as plain arrays."""
        weight, bias = (t.detach().cpu().numpy().copy() for t in (self.head.weight, self.head.bias))
        return LinearHead(weight, bias, classes)


def release(
    network: Network, backbone: Backbone, unfreeze: Sequence[str], *, bn: str
) -> tuple[list[str], list[nn.Module]]:
    """Make what `unfreeze` names trainable, and say what has to stay in eval mode.

    Parameters
    ----------
    backbone : Backbone     whose `module` the network holds
    bn : str                BatchNorm of unfrozen layers: frozen, affine (statistics stay) or train

    Returns
    -------
    unfrozen : list of str        names of the trainable parameters, the head's included
    keep_eval : list of Module    frozen layers, and BatchNorm whose statistics stay

    Raises
    ------
    UsageError    a pattern matches nothing
    """
    chosen = set(unfreeze_parameters(backbone, unfreeze))
    keep_eval = list(frozen_modules(backbone, tuple(chosen)))
    norms = {name: module for name, module in backbone.module.model.named_modules() if isinstance(module, BATCH_NORMS)}
    if bn == "frozen":
        chosen -= {f"{name}.{p}" for name, module in norms.items() for p, _ in module.named_parameters()}
    if bn != "train":
        keep_eval += norms.values()
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    for name, parameter in backbone.module.model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name, p in network.named_parameters() if p.requires_grad], keep_eval


def parameter_groups(network: Network, *, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups: two rates, and decay on matrices and kernels only."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            rate = lr if name.startswith(PREFIX) else head_lr
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]

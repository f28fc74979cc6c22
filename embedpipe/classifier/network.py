"""Network: a backbone and a linear head as one trainable module, and which of its parameters train.

Names of parameters are those of the network's state dict: `backbone.model.*` and `head.*`.

>>> network = Network(backbone.module, head)
>>> unfrozen, keep_eval = release(network, backbone, ["layer4"], bn="affine")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, frozen_modules, unfreeze_parameters
from embedpipe.errors import UsageError
from embedpipe.heads import LinearHead
from embedpipe.training import is_exempt_from_decay, layer_numbers

PREFIX = "backbone.model."


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

    @contextmanager
    def checkpointing(self, name: str) -> Iterator[None]:
        """Recompute activations in the backward pass within the block.

        Raises
        ------
        UsageError    the model, called `name`, does not support it
        """
        model: Any = self.backbone.model
        try:
            model.set_grad_checkpointing(enable=True)
        except (AttributeError, NotImplementedError, AssertionError) as exc:  # as timm's models refuse
            hint = "leave it out, or choose a model of timm that has set_grad_checkpointing"
            raise UsageError(f"--grad-checkpointing: {name} does not support it", hint=hint) from exc
        yield
        model.set_grad_checkpointing(enable=False)

    def to_head(self, classes: tuple[str, ...]) -> LinearHead:
        """Return the head as plain arrays."""
        weight, bias = (t.detach().cpu().numpy().copy() for t in (self.head.weight, self.head.bias))
        return LinearHead(weight, bias, classes)


def release(
    network: Network, backbone: Backbone, unfreeze: Sequence[str], *, bn: str
) -> tuple[list[str], list[nn.Module]]:
    """Make the layers in `unfreeze` and the head trainable, and freeze all other parameters.

    Parameters
    ----------
    backbone : Backbone     the backbone whose `module` the network holds
    bn : str                BatchNorm of unfrozen layers: frozen, affine (fixed statistics) or train

    Returns
    -------
    unfrozen : list of str        names of the trainable parameters, including the head's
    keep_eval : list of Module    modules to keep in eval mode: frozen layers, and BatchNorm with fixed statistics

    Raises
    ------
    UsageError    a pattern matches nothing
    """
    chosen = set(unfreeze_parameters(backbone, unfreeze))
    keep_eval = list(frozen_modules(backbone, tuple(chosen)))
    modules = backbone.module.model.named_modules()
    norms = {name: module for name, module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    if bn == "frozen":
        chosen -= {f"{name}.{p}" for name, module in norms.items() for p, _ in module.named_parameters()}
    if bn != "train":
        keep_eval += norms.values()
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    for name, parameter in backbone.module.model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name, p in network.named_parameters() if p.requires_grad], keep_eval


def parameter_groups(
    network: Network,
    backbone: Backbone,
    *,
    lr: float,
    head_lr: float,
    layer_decay: float,
    weight_decay: float,
    l2_sp: float,
) -> list[dict[str, Any]]:
    """Return optimiser groups: learning rates fall by `layer_decay` per layer towards the input; biases and norms do not decay.

    With `l2_sp`, weight matrices and kernels of the backbone are pulled towards their starting values instead of zero.

    Source: Li, Grandvalet, Davoine, ICML 2018 (L2-SP)
    """
    model = backbone.module.model
    numbers = layer_numbers(model, [layer.name for layer in backbone.layers])
    last = max(numbers.values())
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            in_backbone, short = name.startswith(PREFIX), name.removeprefix(PREFIX)
            rate = lr * layer_decay ** (last - numbers.get(short, last)) if in_backbone else head_lr
            undecayed = is_exempt_from_decay(model, short, parameter.ndim)
            anchored = in_backbone and not undecayed and l2_sp > 0
            groups.setdefault((rate, 0.0 if undecayed or anchored else weight_decay, anchored), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "anchored": anchored}
        for (rate, decay, anchored), parameters in groups.items()
    ]

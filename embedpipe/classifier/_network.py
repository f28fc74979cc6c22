"""Network: a backbone and a linear head as one trainable module, and what of it may move.

The finetuning deed enters here. Names in `unfrozen` are those of the network's state dict: `backbone.model.*` and `head.*`.

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
from embedpipe.training import keeps_size, layer_numbers

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

    @contextmanager
    def checkpointing(self, name: str, *, wanted: bool) -> Iterator[None]:
        """Compute activations a second time within the block, where that is wanted.

        Raises
        ------
        UsageError    the model, called `name`, cannot do so
        """
        if not wanted:
            yield
            return
        model: Any = self.backbone.model
        hint = "leave it out, or choose a model of timm that has set_grad_checkpointing"
        refusal = UsageError(f"--grad-checkpointing: {name} cannot do so", hint=hint)
        if not hasattr(model, "set_grad_checkpointing"):
            raise refusal
        try:
            model.set_grad_checkpointing(enable=True)
        except (NotImplementedError, AssertionError) as exc:  # so timm says that a model cannot
            raise refusal from exc
        yield
        model.set_grad_checkpointing(enable=False)

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
    """Return optimiser groups: rates that fall by `layer_decay` a layer towards the input, decay on matrices and kernels only.

    With `l2_sp`, unfrozen matrices and kernels of the backbone are held by their starting weights instead of decayed.
    """
    model = backbone.module.model
    numbers = layer_numbers(model, [layer.name for layer in backbone.layers])
    last = max(numbers.values())
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            inside, own = name.startswith(PREFIX), name.removeprefix(PREFIX)
            rate = lr * layer_decay ** (last - numbers.get(own, last)) if inside else head_lr
            small = keeps_size(model, own, parameter.ndim)
            anchored = inside and not small and l2_sp > 0
            groups.setdefault((rate, 0.0 if small or anchored else weight_decay, anchored), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "anchored": anchored}
        for (rate, decay, anchored), parameters in groups.items()
    ]

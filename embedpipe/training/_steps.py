"""The optimiser, what its parameter groups depend on (layers, weight decay), and one step from several batches: MixUp and
CutMix, precision, micro-batches, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.errors import EmbedpipeError, warn
from embedpipe.training._plan import Plan
from embedpipe.training._ranks import Ranks

Batch = tuple[Tensor, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# torchvision's models do not name the parameters that should not decay; timm's do.
NO_DECAY = ("*class_token", "*pos_embed*", "*relative_position_bias_table", "*logit_scale")


class NotFinite(ArithmeticError):
    """The loss or a gradient is NaN or infinite; no weight has been changed."""


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return an optimiser over groups with their own `lr` and `weight_decay`."""
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


def layer_numbers(model: Any, stages: Sequence[str]) -> dict[str, int]:
    """Return the layer number of each parameter, 0 for the first layer.

    timm's models number their own layers (`group_matcher`). For any other model, the layers are `stages`, dotted names in
    the order of execution; parameters before the first stage are in layer 0.
    """
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        return dict(group_parameters(model, model.group_matcher(coarse=False), reverse=True))
    number, numbers = 0, {}
    for name, _ in model.named_parameters():
        number = next((n for n, stage in enumerate(stages) if name.startswith(f"{stage}.")), number)
        numbers[name] = number
    return numbers


def is_exempt_from_decay(model: Any, name: str, ndim: int) -> bool:
    """Return True if a parameter is exempt from weight decay: biases, norms, and tables such as position embeddings."""
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return ndim <= 1 or any(fnmatch(name, pattern) for pattern in (*NO_DECAY, *own))


def mixer(plan: Plan, n_classes: int) -> Callable[[Tensor, Tensor], Batch]:
    """Return a function that mixes pairs of a batch into images and soft labels float32 (n, n_classes).

    Source: Zhang et al., ICLR 2018 (mixup); Yun et al., ICCV 2019 (CutMix).
    """
    if not plan.mixup and not plan.cutmix:
        return lambda images, y: (images, y)
    from torchvision.transforms import v2

    kinds = ((plan.mixup, v2.MixUp), (plan.cutmix, v2.CutMix))
    mix: Callable[[Tensor, Tensor], Batch] = v2.RandomChoice([k(alpha=a, num_classes=n_classes) for a, k in kinds if a])

    def mix_any_shape(images: Tensor, y: Tensor) -> Batch:
        """Mix activations that are not maps, such as tokens, as maps of one pixel."""
        mixed, soft = mix(images if images.ndim == 4 else images.flatten(1)[:, :, None, None], y)
        return mixed.view_as(images), soft

    return mix_any_shape


class Stepper:
    """Takes optimiser steps of one network.

    micro : int or None    images per micro-batch; None: whole batches. Halved when they do not fit into memory
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        *,
        n_classes: int,
        class_weight: Tensor | None,
        ranks: Ranks,
    ) -> None:
        self.network, self.optimizer, self.plan, self.class_weight = network, optimizer, plan, class_weight
        self.ranks = ranks
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(self.device, enabled=plan.precision == "fp16")
        self.mix = mixer(plan, n_classes)
        self.loss = nn.CrossEntropyLoss(class_weight, label_smoothing=plan.label_smoothing, reduction="sum")
        self.micro: int | None = None
        anchored = [p for g in optimizer.param_groups if g.get("anchored") for p in g["params"]] if plan.l2_sp else []
        self.anchors = [(parameter, parameter.detach().clone()) for parameter in anchored]

    def step(self, batches: Sequence[Batch]) -> float:
        """Take a step along the gradient of the mean loss over all batches, and return that loss.

        Raises
        ------
        NotFinite         the loss or the gradient is NaN or infinite
        EmbedpipeError    one image alone does not fit into memory
        """
        batches = [self.mix(images, y) for images, y in batches]
        weight = self.class_weight
        counts = [len(y) if weight is None or y.ndim > 1 else float(weight[y].sum()) for _, y in batches]
        total = torch.tensor([float(sum(counts))], device=self.parameters[0].device)  # the denominator of the mean
        self.ranks.add([total])
        while (own := self._gradients(batches, total)) is None:
            self._halve(batches)
        loss = self._share(own)
        if not math.isfinite(loss):
            raise NotFinite(f"the training loss became {loss}")
        self.scaler.unscale_(self.optimizer)
        for parameter, start in self.anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.plan.l2_sp)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.plan.clip_norm or math.inf)
        if not (self.scaler.is_enabled() or torch.isfinite(norm)):  # a scaler skips such a step and lowers its scale
            raise NotFinite(f"the gradient became {norm.item()}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def _gradients(self, batches: Sequence[Batch], total: Tensor) -> Tensor | None:
        """Sum the gradients of all micro-batches and return their loss, float32 (1,); None: they do not fit into memory.

        total : float32 (1,)    the total weight of the step, by which each loss is divided
        """
        self.optimizer.zero_grad()
        whole = torch.zeros_like(total)
        precision = torch.autocast(self.device, PRECISIONS[self.plan.precision], enabled=self.plan.precision != "fp32")
        try:
            for images, y in self._pieces(batches):
                with precision:
                    logits = self.network(images).float()
                loss = self.loss(logits, y) / total
                torch.autograd.backward(self.scaler.scale(loss))
                whole += loss.detach()
        except torch.OutOfMemoryError:
            return None
        return whole

    def _share(self, loss: Tensor) -> float:
        """Add up gradients and loss over the ranks."""
        if self.ranks.count > 1:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.ranks.add([loss, *(p.grad for p in self.parameters if p.grad is not None)])
        return loss.item()

    def _pieces(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for images, y in batches:
            size = self.micro or len(y)
            yield from zip(torch.split(images, size), torch.split(y, size), strict=True)

    def _halve(self, batches: Sequence[Batch]) -> None:
        before = min(self.micro or math.inf, max(len(y) for _, y in batches))
        if before == 1:
            raise EmbedpipeError(
                "not even one image at a time fits into memory", hint="unfreeze less, or try --grad-checkpointing"
            )
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.micro = int(before) // 2
        warn(f"{before} images do not fit into memory: {self.micro} at a time, in steps of the same size")

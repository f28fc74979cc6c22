"""Where the feature of a model is: which modules to tap, how an output becomes one vector.

>>> choose_taps(model, record, heads=("fc",), layer=None, pool="auto", name="timm:resnet18")
[]
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from embedpipe.backbones._headless import Pooling, Tap
from embedpipe.backbones._trace import BATCH, Trace
from embedpipe.errors import UsageError
from embedpipe.provenance import nearest

POOLS = ("auto", "avg", "cls", "max", "none")
PREFIX_TOKENS = re.compile(r"(cls|class|dist|reg|register)_tokens?_?\d*")


def choose_taps(
    model: nn.Module, record: Trace, *, heads: Sequence[str], layer: str | None, pool: str, name: str
) -> list[Tap]:
    """Return the modules whose outputs make the feature; none where the model's output is it.

    Raises
    ------
    UsageError    unknown layer or pool, or an output that no pool makes a vector of
    """
    if pool not in POOLS:
        raise UsageError(f"no pool {pool!r}", hint=f"use one of {', '.join(POOLS)}")
    if layer is not None:
        _check_layer(model, record, layer, name)
        return [_tap(model, record, layer, pool=pool, name=name)]
    points = [head for head in heads if head in record.visits] or [""]
    taps = [_tap(model, record, point, pool=pool, name=name) for point in points]
    passed_on = len(taps) == 1 and is_same(record.output, record.visits[points[0]].output)
    return [] if passed_on else taps


def _tap(model: nn.Module, record: Trace, point: str, *, pool: str, name: str) -> Tap:
    visit, where = record.visits[point], f"{point or 'the output'} of {name}"
    last = getattr(model, "output_fmt", "") == "NHWC"
    layout = layout_of(visit.shape, record.image_size, channels_last=last)
    if visit.shape[:1] != (BATCH,) or (layout == "unknown" and pool != "none"):
        raise UsageError(
            f"{where} has the shape {visit.shape} for {BATCH} images, expected a vector, tokens or a map of each image",
            hint="name the block that holds this layer, or use --pool none",
        )
    tokens = visit.shape[1] if layout == "tokens" else 0
    prefix = count_prefix(tokens, record.image_size, _declared_prefix(model)) if tokens else 0
    if pool == "cls" and not prefix:
        raise UsageError(f"{where} has no class token", hint="use --pool avg")
    kind = "none" if layout == "vector" else "avg" if pool == "auto" else pool
    return Tap(point, Pooling(kind, layout, prefix), visit.count)


def is_same(output: Tensor, given: Tensor | None) -> bool:
    """Tell whether a model's output (N, D) is what a module gave, at most flattened."""
    if given is None or output.ndim != 2 or given.numel() != output.numel():
        return False
    same_memory = output.untyped_storage()._cdata == given.untyped_storage()._cdata
    return output is given or (same_memory and given.shape[:2] == output.shape)


def _check_layer(model: nn.Module, record: Trace, layer: str, name: str) -> None:
    modules = [known for known, _ in model.named_modules() if known]
    if layer not in modules:
        close, listed = nearest(layer, modules), f"see `embedpipe layers {name}`"
        raise UsageError(
            f"no layer {layer!r} in {name}",
            hint=f"did you mean {' or '.join(map(repr, close))}?" if close else listed,
            layer=layer,
        )
    if layer not in record.visits or record.visits[layer].output is None:
        raise UsageError(f"layer {layer!r} of {name} gives no output of its own", hint="name a module inside it")


def _declared_prefix(model: nn.Module) -> int:
    """Return the number of class, distillation and register tokens in front of the patches."""
    declared = getattr(model, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if (found := PREFIX_TOKENS.fullmatch(name)) and parameter.ndim > 1:
            counts[found[1]] = max(parameter.shape[-2], counts.get(found[1], 0))  # one set a stage
    return sum(counts.values())


def layout_of(shape: Sequence[int], image_size: tuple[int, int], *, channels_last: bool = False) -> str:
    """Name the layout of an output (N, ...) of images (H, W); `channels_last` decides where the shape cannot.

    A map has the aspect ratio of the image in its last two axes, an NHWC map in the two before.
    """
    if len(shape) == 4:
        aspect = math.log(image_size[0] / image_size[1])
        last = abs(math.log(shape[2] / shape[3]) - aspect)
        first = abs(math.log(shape[1] / shape[2]) - aspect)
        return "nhwc" if first < last or (first == last and channels_last) else "map"
    return {2: "vector", 3: "tokens"}.get(len(shape), "unknown")


def count_prefix(tokens: int, image_size: tuple[int, int], declared: int) -> int:
    """Return how many of `tokens` stand in front of the patches: `declared` where the rest is a grid, else none."""

    def is_grid(count: int) -> bool:
        height = round(math.sqrt(count * image_size[0] / image_size[1]))
        width = round(math.sqrt(count * image_size[1] / image_size[0]))
        return count > 0 and height * width == count

    if is_grid(tokens - declared) or (tokens > declared and not is_grid(tokens)):
        return declared
    return 0

"""From a library's model to a `Backbone`: take the classifier out, find what enters it, write down what shapes a feature.

The rule: a feature is what enters the main classifier. Several classifiers: their inputs, concatenated; a convolutional one:
its pooled input; none (an identity): the model's output.

>>> assemble(model, name="timm:resnet18", heads=("fc",), ...)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from embedpipe.backbones._backbone import Backbone, digest_weights
from embedpipe.backbones._headless import POOLS, Headless, Pooling, Tap, count_prefix, layout_of
from embedpipe.backbones._trace import BATCH, Trace, trace
from embedpipe.errors import UsageError
from embedpipe.provenance import nearest

SCHEMA = 1
PREFIX_TOKENS = re.compile(r"(cls|class|dist|reg|register)_tokens?_?\d*")
Images = Callable[[Any], Tensor]


def find_classifiers(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the named classifiers that the model really has."""
    modules = dict(model.named_modules())
    return tuple(n for n in names if not isinstance(modules.get(n, nn.Identity()), nn.Identity))


def take_classifiers(model: nn.Module, heads: Sequence[str], record: Trace) -> Trace:
    """Put an identity in the place of each classifier, in the model and in what is known of its pass."""
    for head in heads:
        model.set_submodule(head, nn.Identity())
        visit = record.visits.get(head)
        if visit is None or visit.entered is None or visit.output is None:
            continue
        if len(heads) == 1 and _is_same(record.output, visit.output):
            record = replace(record, output=visit.entered.flatten(1))
        visit.output = visit.entered
    return record


def assemble(
    model: nn.Module,
    *,
    name: str,
    heads: Sequence[str],
    layer: str | None,
    pool: str,
    transform: Images,
    image_size: tuple[int, int],
    origin: str,
    build: dict[str, Any],
) -> Backbone:
    """Take the classifiers (`heads`) out of a model and return its backbone.

    Raises
    ------
    UsageError    unknown layer or pool; an image size that the model refuses
    """
    model.eval().requires_grad_(False)
    heads = find_classifiers(model, heads)
    record = take_classifiers(model, heads, trace_or_explain(model, image_size, name))
    taps = choose_taps(
        model, record, heads=heads, layer=layer, pool=pool, image_size=image_size, name=name
    )
    source, _, architecture = name.partition(":")
    spec = {
        "schema": SCHEMA,
        "source": source,
        "architecture": architecture.partition(".")[0] if source == "timm" else architecture,
        "build": build,
        "weights": digest_weights(model),
        "layer": layer or "penultimate",
        "pool": "+".join(tap.pooling.kind for tap in taps) or "none",
        "transform": describe_transform(transform),
    }
    return Backbone(
        name=name,
        module=Headless(model, taps).eval(),
        transform=transform,
        feature_dim=_feature_dim(record, taps),
        spec=spec,
        origin=origin,
        image_size=image_size,
        trace=record,
        build=build,
    )


def wrap_module(
    module: nn.Module,
    *,
    layer: str | None,
    pool: str,
    image_size: int | None,
    transform: Images | None,
) -> Backbone:
    """Return the backbone of a user's own module: its output, or a layer of it, is the feature.

    Raises
    ------
    UsageError    no transform; unknown layer or pool; an image size that the module refuses
    """
    if transform is None:
        raise UsageError(
            "a module without a transform",
            hint="pass transform=, e.g. an embedpipe.images.Transform",
        )
    kind = type(module)
    crop = getattr(transform, "crop_size", (image_size or 224, image_size or 224))
    return assemble(
        module,
        name=f"module:{kind.__module__}.{kind.__qualname__}",
        heads=(),
        layer=layer,
        pool=pool,
        transform=transform,
        image_size=(image_size, image_size) if image_size else (int(crop[0]), int(crop[-1])),
        origin="module: given from Python",
        build={"module": repr(module)},
    )


def describe_transform(transform: Images) -> Any:
    """Return what the spec says of a transform.

    Raises
    ------
    UsageError    it has neither `to_dict()` nor a text form that is the same in the next process
    """
    if hasattr(transform, "to_dict"):
        return transform.to_dict()
    text = repr(transform)
    if " at 0x" in text:
        raise UsageError(
            f"a transform that cannot be told from another: {text}",
            hint="give it a to_dict() method that names all that shapes a pixel, or use embedpipe.images.Transform",
        )
    return text


def choose_taps(
    model: nn.Module,
    record: Trace,
    *,
    heads: Sequence[str],
    layer: str | None,
    pool: str,
    image_size: tuple[int, int],
    name: str,
) -> list[Tap]:
    """Return the modules whose outputs make the feature; none where the model's own output is the feature."""
    if pool not in POOLS:
        raise UsageError(f"no pool {pool!r}", hint=f"use one of {', '.join(POOLS)}")
    if layer is not None:
        _check_layer(model, record, layer, name)
    wanted = (
        [layer] if layer is not None else [head for head in heads if head in record.visits] or [""]
    )
    taps = [
        _tap(model, record, point, pool=pool, image_size=image_size, name=name) for point in wanted
    ]
    passed_on = _is_same(record.output, record.visits[wanted[0]].output)
    return [] if layer is None and len(taps) == 1 and passed_on else taps


def _tap(
    model: nn.Module,
    record: Trace,
    point: str,
    *,
    pool: str,
    image_size: tuple[int, int],
    name: str,
) -> Tap:
    visit = record.visits[point]
    try:
        layout = layout_of(
            visit.shape, image_size, channels_last=getattr(model, "output_fmt", "") == "NHWC"
        )
    except ValueError as exc:
        layout = "none" if pool == "none" else f"unknown: {exc}"
    where = f"{point or 'the output'} of {name}"
    if visit.shape[:1] != (BATCH,) or layout.startswith("unknown"):
        raise UsageError(
            f"{where} has the shape {visit.shape} for {BATCH} images, expected a vector, tokens or a map of each image",
            hint="name the block that holds this layer, or use --pool none",
        )
    prefix = (
        count_prefix(visit.shape[1], image_size, _declared_prefix(model))
        if layout == "tokens"
        else 0
    )
    if pool == "cls" and not prefix:
        raise UsageError(f"{where} has no class token", hint="use --pool avg")
    kind = pool if pool != "auto" else "avg"
    return Tap(point, Pooling("none" if layout == "vector" else kind, layout, prefix), visit.count)


def _is_same(output: Tensor, given: Tensor | None) -> bool:
    """Tell whether a model's output (N, D) is what a module gave, at most flattened."""
    if given is None or output.ndim != 2 or given.numel() != output.numel():
        return False
    same_memory = output.untyped_storage()._cdata == given.untyped_storage()._cdata
    return output is given or (same_memory and given.shape[:2] == output.shape)


def _check_layer(model: nn.Module, record: Trace, layer: str, name: str) -> None:
    modules = [known for known, _ in model.named_modules() if known]
    if layer not in modules:
        close = nearest(layer, modules)
        raise UsageError(
            f"no layer {layer!r} in {name}",
            hint=f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"see `embedpipe layers {name}`",
            layer=layer,
        )
    if layer not in record.visits or record.visits[layer].output is None:
        raise UsageError(
            f"layer {layer!r} of {name} gives no output of its own", hint="name a module inside it"
        )


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


def _feature_dim(record: Trace, taps: Sequence[Tap]) -> int:
    if not taps:
        return int(record.output.flatten(1).shape[1])
    outputs = [record.visits[tap.name].output for tap in taps]
    return sum(
        tap.pooling(output).shape[1]
        for tap, output in zip(taps, outputs, strict=True)
        if output is not None
    )


def trace_or_explain(model: nn.Module, image_size: tuple[int, int], name: str) -> Trace:
    try:
        return trace(model, image_size)
    except (RuntimeError, AssertionError, ValueError, TypeError) as exc:
        reason = str(exc).partition("\n")[0]
        raise UsageError(
            f"{name} refuses images of {image_size[0]} x {image_size[1]}: {reason}",
            hint="use the model's own --image-size",
            image_size=image_size,
        ) from exc

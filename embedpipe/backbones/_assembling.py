"""From a library's model to a `Backbone`: take the classifier out, note what shapes a feature.

The rule: a feature is what enters the main classifier. Several classifiers: their inputs,
concatenated; a convolutional one: its pooled input; none (an identity): the model's output.

>>> assemble(model, name="timm:resnet18", heads=("fc",), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from embedpipe.backbones._backbone import Backbone, digest_weights
from embedpipe.backbones._headless import Headless, PassThrough, Tap
from embedpipe.backbones._tapping import choose_taps, is_same
from embedpipe.backbones._trace import Trace, trace
from embedpipe.errors import UsageError
from embedpipe.images import MAX_PIXELS
from embedpipe.provenance import digest_arrays

SCHEMA = 1
Images = Callable[[Any], Tensor]


def find_classifiers(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the named classifiers that the model really has."""
    modules = dict(model.named_modules())
    return tuple(n for n in names if not isinstance(modules.get(n, nn.Identity()), nn.Identity))


def take_classifiers(model: nn.Module, heads: Sequence[str], record: Trace) -> Trace:
    """Let each classifier pass on what it takes, in the model and in what is known of its pass."""
    for head in heads:
        model.set_submodule(head, PassThrough())
        visit = record.visits.get(head)
        if visit is None or visit.entered is None or visit.output is None:
            continue
        if len(heads) == 1 and is_same(record.output, visit.output):
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
    files: tuple[Path, ...] | None = None,
) -> Backbone:
    """Take the classifiers (`heads`) out of a model and return its backbone.

    Raises
    ------
    UsageError    unknown layer or pool; an image size that the model refuses
    """
    model.eval().requires_grad_(False)
    heads = find_classifiers(model, heads)
    record = take_classifiers(model, heads, trace_or_explain(model, image_size, name))
    taps = choose_taps(model, record, heads=heads, layer=layer, pool=pool, name=name)
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
        trace=record,
        heads=tuple(heads),
        build=build,
        files=files,
    )


def at_layer(backbone: Backbone, layer: str | None, *, pool: str = "auto") -> Backbone:
    """Return the backbone of another layer of the same model; the two share its weights, and a pass where joined.

    Raises
    ------
    UsageError    unknown layer or pool
    """
    model, record = backbone.module.model, backbone.trace
    taps = choose_taps(model, record, heads=backbone.heads, layer=layer, pool=pool, name=backbone.name)
    kind = "+".join(tap.pooling.kind for tap in taps) or "none"
    return replace(
        backbone,
        module=Headless(model, taps).eval(),
        feature_dim=_feature_dim(record, taps),
        spec={**backbone.spec, "layer": layer or "penultimate", "pool": kind},
    )


def wrap_module(
    module: nn.Module, *, layer: str | None, pool: str, image_size: int | None, transform: Images | None
) -> Backbone:
    """Return the backbone of a user's own module: its output, or a layer of it, is the feature."""
    if transform is None:
        raise UsageError("a module without a transform", hint="pass transform=, e.g. an embedpipe.images.Transform")
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
        build={"module": repr(module), **_unsaved_buffers(module)},
    )


def _unsaved_buffers(module: nn.Module) -> dict[str, str]:
    """Return a digest of what shapes the output and is in no state dict; a library makes its own anew by name."""
    saved = module.state_dict()
    unsaved = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
    return {"buffers": digest_arrays(unsaved)} if unsaved else {}


def describe_transform(transform: Images) -> Any:
    """Return what the spec says of a transform."""
    if hasattr(transform, "to_dict"):
        return transform.to_dict()
    text = repr(transform)
    if " at 0x" in text:
        raise UsageError(
            f"a transform that cannot be told from another: {text}",
            hint="give it a to_dict() that names all that shapes a pixel, or use images.Transform",
        )
    return text


def trace_or_explain(model: nn.Module, image_size: tuple[int, int], name: str) -> Trace:
    """Return the model's trace."""
    if image_size[0] * image_size[1] > MAX_PIXELS:
        raise UsageError(
            f"images of {image_size[0]} x {image_size[1]}, expected at most {MAX_PIXELS} pixels",
            hint="give a smaller --image-size",
        )
    try:
        return trace(model, image_size)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as exc:
        reason = str(exc).partition("\n")[0]
        raise UsageError(
            f"{name} refuses images of {image_size[0]} x {image_size[1]}: {reason}",
            hint="use the model's own --image-size",
            image_size=image_size,
        ) from exc


def _feature_dim(record: Trace, taps: Sequence[Tap]) -> int:
    if not taps:
        return int(record.output.flatten(1).shape[1])
    outputs = [(tap.pooling, record.visits[tap.name].output) for tap in taps]
    return sum(pooling(output).shape[1] for pooling, output in outputs if output is not None)

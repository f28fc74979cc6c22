"""From a name, a module or a folder to a `Backbone`.

>>> load_backbone("timm:resnet18", weights="none").feature_dim
512
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from embedpipe.backbones._assembling import (
    Images,
    assemble,
    find_classifiers,
    take_classifiers,
    trace_or_explain,
    wrap_module,
)
from embedpipe.backbones._backbone import Backbone, Layer, find_stages
from embedpipe.backbones._libraries import LIBRARIES, Library, resolve_name
from embedpipe.backbones._saving import DESCRIPTION, load_model
from embedpipe.backbones._state import fill, headless_state, read_weights
from embedpipe.backbones._trace import Weightless
from embedpipe.backbones.weights import package_for
from embedpipe.errors import UsageError, WeightsUnavailable, check_pixels_option
from embedpipe.images import Transform
from embedpipe.storage import PathLike


def load_backbone(
    name: PathLike | nn.Module,
    *,
    weights: PathLike = "pretrained",
    layer: str | None = None,
    pool: str = "auto",
    seed: int = 0,
    image_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    pixels: str | None = None,
    transform: Images | None = None,
) -> Backbone:
    """Return a frozen backbone that gives the penultimate features, or those of an intermediate layer.

    Parameters
    ----------
    name : str
        "timm:NAME", "torchvision:NAME", a bare timm name, a folder that `save_model` wrote, or a user's own module whose
        output is the feature (it comes with its weights and needs a `transform`)
    weights : str
        "pretrained" (the library's hub), "none" (random from `seed`), "packaged" (an installed package) or a file
    layer : str
        dotted module name; None for what enters the classifier
    pool : "auto", "avg", "max", "cls" or "none"
        from maps and tokens to one vector; auto = average over patches
    image_size, crop_pct, interpolation
        change the model's own evaluation transform
    pixels : str
        no longer used: "exact" is a warning, "fast" an error
    transform : callable
        RGB image -> float32 (3, H, W), in place of it

    Raises
    ------
    UsageError            unknown model, layer, pool or weights; an image size that the model refuses
    WeightsUnavailable    no network, or no package with weights for this model
    ModelMismatch         a weights file of another model
    """
    check_pixels_option(pixels)
    asked = {"crop_pct": crop_pct, "interpolation": interpolation}
    if isinstance(name, nn.Module):
        _refuse("a module of your own", weights=weights, **asked)
        return wrap_module(name, layer=layer, pool=pool, image_size=image_size, transform=transform)
    if (Path(name) / DESCRIPTION).is_file():
        _refuse(f"the model in {os.fspath(name)}", weights=weights, image_size=image_size, **asked)
        return load_model(name, layer=layer, pool=pool, transform=transform)
    source, architecture = resolve_name(os.fspath(name))
    library = LIBRARIES[source]
    canonical = _transform_for(library, architecture, image_size, crop_pct, interpolation)
    options = library.options_for(architecture, image_size)
    pretrained = weights == "pretrained"
    full_name = f"{source}:{architecture}"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = library.build(architecture, options=options, pretrained=pretrained)
    except OSError as exc:
        raise WeightsUnavailable(
            f"no network and no stored weights for {full_name}",
            hint="use --weights packaged, --weights FILE or --weights none",
        ) from exc
    heads = library.classifiers_of(architecture, model)
    origin = library.origin_of(architecture) if pretrained else f"none: seed {seed}"
    files = library.files_of(architecture) if pretrained else ()
    if weights == "packaged":
        package = package_for(f"{source}:{library.bare_name(architecture)}")
        state = package.read(package.locate(), headless_state(model, heads))
        fill(model, state, heads=heads, source=package.distribution, name=full_name)
        canonical, origin, files = replace(canonical, **package.transform), package.origin, (package.locate(),)
    elif weights not in ("pretrained", "none"):
        state = read_weights(Path(weights), dropped=library.AUXILIARY)
        fill(model, state, heads=heads, source=str(weights), name=full_name)
        origin, files = f"file: {os.fspath(weights)}", (Path(weights).absolute(),)
    return assemble(
        model,
        name=full_name,
        heads=heads,
        layer=layer,
        pool=pool,
        transform=transform or canonical,
        image_size=canonical.crop_size,
        origin=origin,
        build=options,
        files=files,
    )


def describe_layers(name: str) -> tuple[Layer, ...]:
    """Return the stages of a model in the order in which they run; it is built on the meta device, without weights.

    Raises
    ------
    UsageError    unknown model
    """
    if (Path(name) / DESCRIPTION).is_file():
        return load_model(name).layers
    source, architecture = resolve_name(name)
    library = LIBRARIES[source]
    with Weightless():
        model = library.build(architecture, options=library.options_for(architecture, None), pretrained=False).eval()
    size = _transform_for(library, architecture, None, None, None).crop_size
    record = trace_or_explain(model, size, name)
    take_classifiers(model, find_classifiers(model, library.classifiers_of(architecture, model)), record)
    return find_stages(model, record)


def _refuse(what: str, *, weights: PathLike, **options: float | str | None) -> None:
    """Say which options a model cannot take that brings its own weights and its own transform."""
    asked = [name for name, value in options.items() if value is not None]
    asked += ["weights"] if weights != "pretrained" else []
    if asked:
        raise UsageError(
            f"{what} brings its own weights and transform, found --{asked[0].replace('_', '-')} beside it",
            hint="leave that out, or name a model of timm or torchvision",
        )


def _transform_for(
    library: Library, architecture: str, image_size: int | None, crop_pct: float | None, interpolation: str | None
) -> Transform:
    try:
        return library.transform_for(
            architecture, image_size=image_size, crop_pct=crop_pct, interpolation=interpolation
        )
    except ValueError as exc:
        raise UsageError(
            str(exc), hint="interpolations are bicubic, bilinear, lanczos, nearest, box and hamming"
        ) from exc

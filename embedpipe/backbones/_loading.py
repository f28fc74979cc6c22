"""Load a model as a `Backbone`: from a library by its name, from a folder, or from a user's own module.

Names are `timm:NAME`, `torchvision:NAME`, or a bare timm name. `_timm` and `_torchvision` have the same functions.

A library's model is built with its own default options, its weights are loaded (pretrained, random, packaged or from a
file), and `make_backbone` removes its classifier.

>>> load_backbone("timm:resnet18", weights="none").feature_dim
512
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from embedpipe.backbones import _timm, _torchvision
from embedpipe.backbones._backbone import Backbone, Images, Layer, find_stages, make_backbone, remove_classifiers
from embedpipe.backbones._trace import MetaWeights
from embedpipe.backbones._weights import load_state, package_for, read_weights, without
from embedpipe.errors import ModelMismatch, UsageError, WeightsUnavailable, check_pixels_option
from embedpipe.images import Transform
from embedpipe.provenance import digest_arrays, nearest
from embedpipe.storage import PathLike

SCHEMA = 1
FIELDS = {
    "name": str,
    "layer": str | None,
    "pool": str,
    "image_size": list,
    "transform": dict | str,
    "build": dict,
    "origin": str,
}
DESCRIPTION, CONFIG, WEIGHTS = "embedpipe.json", "config.json", "model.safetensors"


class Library(Protocol):
    """What `_timm` and `_torchvision` both offer."""

    def names(self) -> list[str]: ...
    def knows(self, architecture: str) -> bool: ...
    def options_for(self, architecture: str, image_size: int | None) -> dict[str, Any]: ...
    def build(self, architecture: str, *, options: dict[str, Any], pretrained: bool) -> nn.Module: ...
    def origin_of(self, architecture: str) -> tuple[str, tuple[Path, ...] | None]: ...
    def classifiers_of(self, architecture: str, model: nn.Module) -> tuple[str, ...]: ...
    def transform_for(
        self, architecture: str, image_size: int | None, crop_pct: float | None, interpolation: str | None
    ) -> Transform: ...
    def config_for(self, architecture: str, *, n_classes: int, transform: Any) -> dict[str, Any]: ...
    def open_folder(self, folder: Path) -> nn.Module: ...


LIBRARIES: dict[str, Library] = {"timm": _timm, "torchvision": _torchvision}


def list_models(pattern: str | None = None) -> list[str]:
    """Return the classification models of both libraries whose name contains `pattern` or matches it as a glob."""
    names = [f"{source}:{name}" for source, library in LIBRARIES.items() for name in library.names()]
    glob = pattern if pattern and any(c in pattern for c in "*?[") else f"*{pattern or ''}*"
    return [name for name in names if fnmatchcase(name, glob) or fnmatchcase(name.partition(":")[2], glob)]


def resolve_name(name: str) -> tuple[str, str]:
    """Split a model's name into library and architecture.

    Raises
    ------
    UsageError    no such model; the hint gives the closest names of both libraries
    """
    source, _, architecture = name.rpartition(":")
    source = source or "timm"
    if source in LIBRARIES and LIBRARIES[source].knows(architecture):
        return source, architecture
    known = list_models()
    bare = {full.partition(":")[2] for full in known}
    close = [full for near in nearest(architecture, bare) for full in known if full.partition(":")[2] == near]
    hint = f"did you mean {' or '.join(close[:3])}?" if close else "see `embedpipe models`"
    raise UsageError(f"no model {name!r} in timm or torchvision", hint=hint)


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
        output is the feature (it brings its weights and needs a `transform`)
    weights : str
        "pretrained" (the library's hub), "none" (random from `seed`), "packaged" (an installed package) or a file
    layer : str
        dotted module name; None for the input of the classifier
    pool : "auto", "avg", "max", "cls" or "none"
        from maps and tokens to one vector; auto = average over patches
    image_size, crop_pct, interpolation
        change the model's own evaluation transform
    pixels : str
        no longer used: "exact" is a warning, "fast" an error
    transform : callable
        RGB image -> float32 (3, H, W), instead of the model's own

    Raises
    ------
    UsageError            unknown model, layer, pool or weights; an image size that the model refuses
    WeightsUnavailable    no network, or no package with weights for this model
    ModelMismatch         a weights file of another model
    """
    check_pixels_option(pixels)
    overrides = {"crop_pct": crop_pct, "interpolation": interpolation}
    if isinstance(name, nn.Module):
        _refuse_options("a module of your own", weights=weights, **overrides)
        return _wrap_module(name, layer=layer, pool=pool, image_size=image_size, transform=transform)
    if (Path(name) / DESCRIPTION).is_file():
        _refuse_options(f"the model in {os.fspath(name)}", weights=weights, image_size=image_size, **overrides)
        return load_model(name, layer=layer, pool=pool, transform=transform)
    source, architecture = resolve_name(os.fspath(name))
    library, full_name, pretrained = LIBRARIES[source], f"{source}:{architecture}", weights == "pretrained"
    options = library.options_for(architecture, image_size)
    try:
        canonical = library.transform_for(architecture, image_size, crop_pct, interpolation)
    except ValueError as exc:
        hint = "interpolations are bicubic, bilinear, lanczos, nearest, box and hamming"
        raise UsageError(str(exc), hint=hint) from exc
    model = _build_model(source, architecture, options, pretrained=pretrained, seed=seed)
    heads = library.classifiers_of(architecture, model)
    if pretrained or weights == "none":
        origin, files = library.origin_of(architecture) if pretrained else (f"none: seed {seed}", ())
    elif weights == "packaged":
        package = package_for(full_name.partition(".")[0])
        files = (package.locate(),)
        state = package.read(files[0], without(model.state_dict(), heads))
        load_state(model, state, heads=heads, source=package.distribution, name=full_name)
        canonical = replace(canonical, **package.transform)
        origin = f"packaged: {package.distribution} {version(package.distribution)}"
    else:
        load_state(model, read_weights(Path(weights)), heads=heads, source=str(weights), name=full_name)
        origin, files = f"file: {os.fspath(weights)}", (Path(weights).absolute(),)
    return make_backbone(
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


def _build_model(source: str, architecture: str, options: dict[str, Any], *, pretrained: bool, seed: int) -> nn.Module:
    """Return a model of a library, with pretrained weights or random ones from a seed.

    Raises
    ------
    WeightsUnavailable    no network and no stored weights
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LIBRARIES[source].build(architecture, options=options, pretrained=pretrained)
    except OSError as exc:
        hint = "use --weights packaged, --weights FILE or --weights none"
        raise WeightsUnavailable(f"no network and no stored weights for {source}:{architecture}", hint=hint) from exc


def load_model(
    folder: PathLike, *, layer: str | None = None, pool: str = "auto", transform: Images | None = None
) -> Backbone:
    """Return the backbone in a folder that `save_model` wrote, at its own layer or at another one.

    Raises
    ------
    ModelMismatch    not such a folder, a newer format, or weights of another model
    UsageError       unknown layer or pool
    """
    root = Path(folder)
    stored = read_description(root)
    name, build = stored["name"], stored["build"]
    source, _, architecture = name.partition(":")
    if source not in LIBRARIES:
        hint = "load them into your module and pass it to load_backbone"
        raise ModelMismatch(f"{root} holds the weights of {name}, a module of your own", hint=hint)
    library = LIBRARIES[source]
    if not library.knows(architecture) or build not in ({}, library.options_for(architecture, stored["image_size"][0])):
        message = f"{root} names {name} built with {build}, which is no model of {source}"
        raise ModelMismatch(message, hint="update timm and torchvision, or save the model again")
    model = library.build(architecture, options=build, pretrained=False)
    heads = library.classifiers_of(architecture, model)
    load_state(model, read_weights(root / WEIGHTS), heads=heads, source=str(root), name=name)
    return make_backbone(
        model,
        name=name,
        heads=heads,
        layer=layer or stored["layer"],
        pool=pool if layer else stored["pool"],
        transform=transform or _transform_of(stored, root),
        image_size=tuple(stored["image_size"]),
        origin=stored["origin"],
        build=build,
        files=(root.absolute() / DESCRIPTION, root.absolute() / WEIGHTS),
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Return the checked content of `embedpipe.json`."""
    try:
        stored: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelMismatch(f"{folder} holds no model of embedpipe", hint=f"expected a {DESCRIPTION} in it") from exc
    schema = stored.get("schema") if isinstance(stored, dict) else None
    if schema != SCHEMA:
        message = f"{folder} has the format {schema}, this version reads {SCHEMA}"
        raise ModelMismatch(message, hint="use a newer embedpipe")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(stored.get(name), kind)]
    if wrong or [type(side) for side in stored["image_size"]] != [int, int]:
        raise ModelMismatch(f"{folder / DESCRIPTION} has no valid {', '.join(wrong) or 'image_size'}")
    return stored


def _transform_of(stored: dict[str, Any], folder: Path) -> Transform:
    try:
        return Transform.from_dict(stored["transform"])
    except (ValueError, TypeError, AttributeError) as exc:
        hint = "extract and fine-tune again, or pass transform="
        raise ModelMismatch(f"{folder} has a transform that cannot be applied any more: {exc}", hint=hint) from exc


def describe_layers(name: str) -> tuple[Layer, ...]:
    """Return the stages of a model in the order in which they run, without its weights.

    Raises
    ------
    UsageError    unknown model
    """
    if (Path(name) / DESCRIPTION).is_file():
        return load_model(name).layers
    source, architecture = resolve_name(name)
    library = LIBRARIES[source]
    with MetaWeights():
        model = library.build(architecture, options=library.options_for(architecture, None), pretrained=False).eval()
    size = library.transform_for(architecture, None, None, None).crop_size
    trace, _ = remove_classifiers(model, library.classifiers_of(architecture, model), size, name)
    return find_stages(model, trace)


def _wrap_module(
    module: nn.Module, *, layer: str | None, pool: str, image_size: int | None, transform: Images | None
) -> Backbone:
    """Return the backbone of a user's own module: the feature is its output, or a layer of it."""
    if transform is None:
        raise UsageError("a module without a transform", hint="pass transform=, e.g. an embedpipe.images.Transform")
    saved = module.state_dict()
    # Buffers that it lacks shape the output too; a library's model makes them from its name.
    unsaved = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
    crop = (image_size, image_size) if image_size else getattr(transform, "crop_size", (224, 224))
    return make_backbone(
        module,
        name=f"module:{type(module).__module__}.{type(module).__qualname__}",
        heads=(),
        layer=layer,
        pool=pool,
        transform=transform,
        image_size=(int(crop[0]), int(crop[-1])),
        origin="module: given from Python",
        build={"module": repr(module)} | ({"buffers": digest_arrays(unsaved)} if unsaved else {}),
    )


def _refuse_options(what: str, *, weights: PathLike, **options: float | str | None) -> None:
    """Raise a UsageError for options that a model with its own weights and transform cannot take."""
    refused = [name for name, value in options.items() if value is not None]
    refused += ["weights"] if weights != "pretrained" else []
    if refused:
        option = refused[0].replace("_", "-")
        message = f"{what} brings its own weights and transform: it cannot take --{option}"
        raise UsageError(message, hint="leave that option out, or name a model of timm or torchvision")

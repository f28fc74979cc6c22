"""Open the cached layers of the model that a data set was extracted with, and extract missing ones.

>>> features = open_layers(open_features(Cache(Path("cache")), "pets"))
>>> [space.spec["layer"] for space in features.spaces][-1]
'penultimate'
"""

from __future__ import annotations

from typing import Any

from embedpipe.backbones import describe_layers
from embedpipe.errors import UsageError, warn
from embedpipe.features import PENULTIMATE, FeatureSet, loader_of, model_fields
from embedpipe.inference import Progress
from embedpipe.selection import check_classes, check_labelled, check_task


def open_layers(features: FeatureSet, progress: Progress | None = None) -> FeatureSet:
    """Return the features of all layers of the model of `features`, in its order.

    Raises
    ------
    UsageError    no labels, one class, no val, or a layer is missing and the backbone has no name
    """
    check_labelled(features)
    check_task(features, "advise")
    check_classes(features)
    name = features.manifest.name
    if "val" not in features.splits:
        raise UsageError(f"{name} has no validation samples", hint="add val/ images, or extract again")
    model = features.loader.get("name")
    every = [*(layer.name for layer in (describe_layers(model) if model else ())), PENULTIMATE]
    cached = _siblings(features).layers
    missing = [layer for layer in every if layer not in cached]
    if missing and not model:
        message = f"{', '.join(missing)} of {name} is not cached, and its backbone has no name to load it by"
        raise UsageError(message, hint=f"extract with layer=({PENULTIMATE!r}, 'all')")
    if missing:
        _extract(features, missing, progress)
    return _siblings(features)


def _siblings(features: FeatureSet) -> FeatureSet:
    """Return the features of all cached layers of the same model, with the same transform."""
    every, model = features.reopened(every=True), model_fields(features.space.spec)
    layers = {s.spec["layer"]: s for s in every.spaces if model_fields(s.spec) == model}
    return every.only(layers.values())


def _extract(features: FeatureSet, missing: list[str], progress: Progress | None) -> None:
    """Fill the spaces of all layers in one pass; the sample table with its splits is not changed."""
    from embedpipe.commands.extract import extract

    count = f"{len(missing)} layers are not cached yet" if len(missing) > 1 else f"{missing[0]} is not cached yet"
    warn(f"{count}: extracting all layers of {features.manifest.name} in one pass")
    spec, cache = features.space.spec, features.cache
    options: dict[str, Any] = {k: v for k, v in loader_of(spec, features.loader).items() if k != "layer"}
    settings = {"precision": spec["precision"], "store_dtype": spec["stored_dtype"], "layer": (PENULTIMATE, "all")}
    sources = [source.absolute for source in features.manifest.sources]
    done = extract(sources, options.pop("name"), **settings, **options, cache_dir=cache.root, progress=progress)
    dataset = cache.write_dataset(features.manifest)
    cache.set_latest(dataset, [space["space"].rpartition("/")[2] for space in done.summary["spaces"]])

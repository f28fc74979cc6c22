"""The cached layers of the model that a data set was extracted with; those that are missing are extracted.

>>> features = open_layers(Cache(Path("cache")), "pets")
>>> [space.spec["layer"] for space in features.spaces][-1]
'penultimate'
"""

from __future__ import annotations

import warnings
from typing import Any

from embedpipe.backbones import describe_layers
from embedpipe.cache import Cache, Space
from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.features import PENULTIMATE, FeatureSet, loader_of, open_features
from embedpipe.inference import Progress
from embedpipe.selection import check_classes, check_labelled, check_task


def open_layers(
    cache: Cache, dataset: str | None, *, space: str | None, backbone: str | None, progress: Progress | None = None
) -> FeatureSet:
    """Return the features of all layers of one model, in its order.

    Raises
    ------
    UsageError    nothing extracted, no labels, one class, no val, or a layer is missing and the backbone has no name
    """
    features = open_features(cache, dataset, space=space, backbone=backbone)
    check_labelled(features)
    check_task(features, "advise")
    check_classes(features)
    name = features.manifest.name
    if "val" not in features.splits:
        raise UsageError(f"{name} has no validation samples to judge on", hint="add val/ images, or extract again")
    model = features.loader.get("name")
    found = _siblings(features)
    lacking = _lacking(found, model)
    if lacking and not model:
        raise UsageError(
            f"{', '.join(lacking)} of {name} is not cached, and its backbone has no name to load it by",
            hint=f"extract with layer=({PENULTIMATE!r}, 'all')",
        )
    if lacking:
        _extract(cache, features, lacking, progress)
        found = _siblings(features)
    return found


def is_sibling(one: Space, other: Space) -> bool:
    """Whether two spaces are of the same model and pixels, at whatever layer."""
    first, second = ({k: v for k, v in s.spec.items() if k not in ("layer", "pool")} for s in (one, other))
    return first == second


def _siblings(features: FeatureSet) -> FeatureSet:
    every = features.reopened(every=True)
    layers = {s.spec["layer"]: s for s in every.spaces if is_sibling(s, features.space)}
    return every.only(layers.values())


def _lacking(found: FeatureSet, model: str | None) -> list[str]:
    wanted = [*(layer.name for layer in describe_layers(model))] if model else []
    there = {space.spec["layer"] for space in found.spaces}
    return [layer for layer in (*wanted, PENULTIMATE) if layer not in there]


def _extract(cache: Cache, features: FeatureSet, lacking: list[str], progress: Progress | None) -> None:
    """Fill the spaces of all layers in one pass; the sample table, with its splits, stays as it is."""
    from embedpipe.commands.extract import extract

    spec = features.space.spec
    options: dict[str, Any] = {k: v for k, v in loader_of(spec, features.loader).items() if k != "layer"}
    count = f"{len(lacking)} layers are not cached yet" if len(lacking) > 1 else f"{lacking[0]} is not cached yet"
    warnings.warn(
        f"{count}: extracting all layers of {features.manifest.name} in one pass", EmbedpipeWarning, stacklevel=4
    )
    settings = {"precision": spec["precision"], "store_dtype": spec["stored_dtype"], "layer": (PENULTIMATE, "all")}
    sources = [source.absolute for source in features.manifest.sources]
    done = extract(sources, options.pop("name"), **settings, **options, cache_dir=cache.root, progress=progress)
    dataset = cache.write_dataset(features.manifest)
    cache.set_latest(dataset, [space["space"].rpartition("/")[2] for space in done.summary["spaces"]])

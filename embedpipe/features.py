"""FeatureSet: the cached features of a data set, by split, read when accessed.

`extract` returns it and `fit_head` takes it. Labels and splits come from the sample table, rows from one space or from several
side by side. Rows are read from the memory-mapped file on access.

>>> X, y = open_features(Cache(Path("cache"))).arrays("train")
>>> open_features(Cache(Path("cache")), layer=("layer3", "penultimate")).widths
(256, 512)
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Cache, Space, dataset_name
from embedpipe.data import SPLITS, Manifest, Sample
from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.heads import ChunkedFeatures
from embedpipe.provenance import canonical_json

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.cache import SpaceView


COPIES = 3  # of the features while a head is fitted: as read, standardised, and centred
PENULTIMATE = "penultimate"  # the default layer: the input of the classifier
LAYER_FIELDS = ("layer", "pool")  # of a spec: where in the model the features are taken
REMOVED_OPTIONS = ("pixels",)  # of `extract`; recorded in spaces and runs


@dataclass(frozen=True)
class FeatureSet:
    """Features of one data set in one space, or in several whose columns are concatenated.

    manifest : Manifest     samples with label, split and group
    space : Space           first space
    backbone : Backbone     what made them, where it is at hand
    summary : dict          what extracting them took (the JSON of `extract`)
    extra_spaces : tuple of Space    further spaces, whose columns follow those of `space`
    """

    manifest: Manifest
    space: Space
    backbone: Backbone | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    extra_spaces: tuple[Space, ...] = ()

    @property
    def spaces(self) -> tuple[Space, ...]:
        """All spaces in column order."""
        return (self.space, *self.extra_spaces)

    def only(self, spaces: Iterable[Space]) -> FeatureSet:
        """Return the same samples with the columns of some spaces only."""
        first, *others = spaces
        return replace(self, space=first, extra_spaces=tuple(others))

    def views(self) -> tuple[FeatureSet, ...]:
        """Return the cached views of the images, all of one augmentation and seed: those that were extracted last, else most."""
        found: dict[tuple[str, int, int], dict[int, Space]] = defaultdict(dict)
        for space in feature_spaces(self.cache):
            made = space.spec["transform"] if space.spec["view"] else {}
            for number, clean in enumerate(self.spaces):
                if made and _clean_spec(space.spec) == _clean_spec(clean.spec):
                    found[made["augment"], made["seed"], made["view"]][number] = space
        latest = (self.cache.latest() or {"spaces": []})["spaces"]
        sets: dict[tuple[str, int], list[FeatureSet]] = defaultdict(list)
        for (augment, seed, _), spaces in sorted(found.items()):
            if len(spaces) == len(self.spaces):
                sets[augment, seed].append(self.only(spaces[number] for number in sorted(spaces)))
        newest = sorted(sets.values(), key=lambda views: (views[0].space.folder.name in latest, len(views)))
        return tuple(newest[-1]) if newest else ()

    def reopened(self, **requested: Any) -> FeatureSet:
        """Return the features that `open_features` finds for the same data set in the same cache."""
        return replace(open_features(self.cache, self.dataset, **requested), backbone=self.backbone)

    @property
    def cache(self) -> Cache:
        """The cache that holds the rows."""
        return Cache(self.space.folder.parent.parent)

    @property
    def dataset(self) -> str:
        """Name of the sample table of the data set."""
        return dataset_name(self.manifest)

    @property
    def loader(self) -> dict[str, Any]:
        """Keyword arguments of `load_backbone` for the backbone of the rows; empty for a backbone passed as an object."""
        return self.space.loader

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer of the model that each space holds."""
        return tuple(space.spec["layer"] for space in self.spaces)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of columns of each space."""
        return tuple(space.feature_dim or 0 for space in self.spaces)

    @property
    def feature_dim(self) -> int:
        return sum(self.widths)

    @cached_property
    def _views(self) -> tuple[SpaceView, ...]:
        return tuple(space.view() for space in self.spaces)

    @cached_property
    def _present(self) -> tuple[Sample, ...]:
        """Samples with a row in every space."""
        return tuple(sample for sample in self.manifest.samples if all(sample.key in view for view in self._views))

    @property
    def missing(self) -> int:
        """Number of samples without a row that are not recorded failures: another `extract` would compute them."""
        views = self._views
        return sum(any(s.key not in v and s.key not in v.failures for v in views) for s in self.manifest.samples)

    @property
    def splits(self) -> dict[str, int]:
        """Number of samples with a row, by split."""
        counts = Counter(sample.split for sample in self._present)
        return {split: counts[split] for split in SPLITS if counts[split]}

    def samples(self, split: str | None = None, *, labelled: bool = False) -> tuple[Sample, ...]:
        """Return the samples with a row, in order; optionally of one split, or with a label only."""
        return tuple(
            sample
            for sample in self._present
            if split in (None, sample.split) and not (labelled and sample.label is None)
        )

    def paths(self, split: str | None = None) -> list[str]:
        """Return the path of each row of `arrays(split)`: the DATA argument joined with the relative path."""
        return [self.manifest.display_name(s) for s in self._rows_of(split)]

    def arrays(self, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return features float32 (N, D) and class indices int64 (N,) of a split, or of all samples.

        The targets of several labels per image are float32 (N, C) of 0 and 1, those of regression float64 (N,). In labelled
        data, images without a label are left out; in unlabelled data every index is -1.

        Raises
        ------
        UsageError    no such split
        """
        if split is not None and split not in self.splits:
            hint = f"found {', '.join(self.splits) or 'no features at all'}"
            raise UsageError(f"no split {split!r} with features in {self.manifest.name}", hint=hint)
        samples = self._rows_of(split)
        return self.read(samples), self.manifest.targets(samples)

    def _rows_of(self, split: str | None) -> tuple[Sample, ...]:
        return self.samples(split, labelled=self.manifest.labelled)

    def labelled(self, *splits: str, max_bytes: float) -> tuple[np.ndarray | ChunkedFeatures, np.ndarray]:
        """Return features (N, D) and targets of the labelled images of some splits, in the order of storage.

        Features that exceed `max_bytes` (`fits`) are returned as a reader of chunks.
        """
        samples = self.labelled_samples(*splits)
        return self.rows(samples, max_bytes=max_bytes), self.manifest.targets(samples)

    def labelled_samples(self, *splits: str) -> tuple[Sample, ...]:
        """Return the labelled samples of some splits with a row, in the order of storage, which is that of their keys."""
        found = [sample for split in splits for sample in self.samples(split, labelled=True)]
        return tuple(sorted(found, key=lambda sample: sample.key))

    def rows(self, samples: tuple[Sample, ...], *, max_bytes: float) -> np.ndarray | ChunkedFeatures:
        """Return features (N, D) of samples with a row; a reader of chunks if they exceed `max_bytes` (`fits`)."""
        if self.fits(max_bytes):
            return self.read(samples)
        keys = np.array([sample.key for sample in samples], dtype=object)
        return ChunkedFeatures((len(keys), self.feature_dim), lambda rows: self._read(keys[rows].tolist()))

    def fits(self, max_bytes: float) -> bool:
        """Whether COPIES times the features fit into `max_bytes`."""
        return COPIES * len(self._present) * self.feature_dim * 4 <= max_bytes

    def read(self, samples: tuple[Sample, ...]) -> np.ndarray:
        """Return features float32 (N, D) of samples with a row."""
        return self._read([sample.key for sample in samples])

    def _read(self, keys: Sequence[bytes]) -> np.ndarray:
        blocks = [view.read(keys).astype(np.float32, copy=False) for view in self._views]
        return np.hstack(blocks) if self.extra_spaces else blocks[0]


def open_features(
    cache: Cache,
    dataset: str | None = None,
    *,
    space: str | Sequence[str] | None = None,
    backbone: str | Sequence[str] | None = None,
    layer: str | Sequence[str] | None = None,
    every: bool = False,
) -> FeatureSet:
    """Find the cached features of a data set.

    Parameters
    ----------
    dataset : str
        Name, id or source path of a data set. Default: the one that was extracted last.
    space, backbone, layer : str or several
        Spaces to use: folder name or prefix, name of the backbone, layer ("all": every cached one, in model order). The
        columns of several spaces are concatenated. Default: the only space, or the one that was extracted last.
    every : bool
        Use all complete spaces that match `backbone` and `layer`.

    Raises
    ------
    UsageError    no features, an ambiguous choice, or a space that lacks images
    """
    manifest = cache.read_dataset(dataset)
    names, backbones, layers = _as_tuple(space), _as_tuple(backbone), _as_tuple(layer)
    if names:
        found = [cache.find_space(name) for name in names]
    elif every:
        found = _every(cache, manifest, backbones, [one for one in layers if one != "all"])
    elif len(backbones) > 1 or len(layers) > 1 or "all" in layers:
        asked = layers or (PENULTIMATE,)
        found = [one for name in backbones or (None,) for one in _of_model(cache, manifest, name, asked)]
    else:
        found = [_only_complete(cache, manifest, next(iter(backbones), None), next(iter(layers), None))]
    first, *others = {space.folder: space for space in found}.values()  # without duplicates
    features = FeatureSet(manifest, first, extra_spaces=tuple(others))
    for one in features.spaces:
        one.mark_used()
    return features


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _only_complete(cache: Cache, manifest: Manifest, backbone: str | None, layer: str | None) -> Space:
    spaces = _spaces_of(cache, backbone)
    complete = [one for one in spaces if layer in (None, one.spec["layer"]) and _is_complete(manifest, one)]
    if complete:
        return _pick(cache, manifest, complete)
    siblings = [space for space in spaces if _is_complete(manifest, space)]
    if layer and siblings:
        raise _missing_layer(manifest, siblings[0], layer)
    names = [(kind, name) for kind, name in (("backbone", backbone), ("layer", layer)) if name]
    request, flags = " and ".join(map(" ".join, names)), "".join(f" --{kind} {name}" for kind, name in names)
    raise _none_complete(manifest, request and f" with {request}", flags)


def _none_complete(manifest: Manifest, request: str, flags: str) -> UsageError:
    """Return the error for a request, such as " with layer layer4", that no space fulfils; `flags` extract what it lacks."""
    message = f"no space holds the features of every image of {manifest.name}{request}"
    return UsageError(message, hint=f"run `embedpipe extract {manifest.sources[0].argument}{flags}`")


def _pick(cache: Cache, manifest: Manifest, spaces: Sequence[Space]) -> Space:
    """Return the only space, or the first one of the last extraction."""
    latest = (cache.latest() or {"spaces": []})["spaces"]
    newest = sorted((s for s in spaces if s.folder.name in latest), key=lambda s: latest.index(s.folder.name))
    if len(spaces) == 1 or newest:
        return (newest or spaces)[0]
    names = ", ".join(one.folder.name for one in spaces)
    raise UsageError(f"{manifest.name} has features in {len(spaces)} spaces: {names}", hint="name one with --space")


def _every(cache: Cache, manifest: Manifest, backbones: Sequence[str], layers: Sequence[str]) -> list[Space]:
    """Return all complete spaces that match, grouped by model and in model order."""
    named = [space for space in _spaces_of(cache, *backbones) if not layers or space.spec["layer"] in layers]
    complete = [space for space in named if _is_complete(manifest, space)]
    if not complete:
        raise _none_complete(manifest, "", " --layer all")
    return [one for spaces in _by_model(complete) for one in _in_model_order(spaces)]


def _of_model(cache: Cache, manifest: Manifest, backbone: str | None, layers: Sequence[str]) -> list[Space]:
    """Return the spaces of layers of one model, in model order.

    Raises
    ------
    UsageError    several models match, or a layer lacks images
    """
    some = [space for space in _spaces_of(cache, backbone) if _is_complete(manifest, space, every=False)]
    if not some:
        return [_only_complete(cache, manifest, backbone, None)]
    full = {one.folder for one in some if _is_complete(manifest, one)}
    models = _by_model(some)
    able = [m for m in models if {*layers} - {"all"} <= {one.spec["layer"] for one in m if one.folder in full}]
    able = able or models
    chosen = _pick(cache, manifest, [one for m in able for one in m]) if len(able) > 1 else able[0][0]
    held = next(m for m in able if any(one is chosen for one in m))
    found = []
    for layer in dict.fromkeys([one.spec["layer"] for one in held] if "all" in layers else layers):
        there = [one for one in held if one.spec["layer"] == layer]
        complete = [one for one in there if one.folder in full]
        if not complete:
            raise _missing_layer(manifest, (there or held)[0], layer)
        found.append(_pick(cache, manifest, complete))
    return _in_model_order(found)


def _missing_layer(manifest: Manifest, space: Space, layer: str) -> UsageError:
    """Return the error for images without features of a layer; `space` is a space of the same model."""
    same = space.spec["layer"] == layer
    count = FeatureSet(manifest, space).missing if same else len(manifest.samples)
    sources = [source.argument for source in manifest.sources]
    command = extract_command(space.spec, {**space.loader, "layer": layer}, sources)
    message = f"{count} of {len(manifest.samples)} images of {manifest.name} have no features of the layer {layer}"
    return UsageError(message, hint=f"run `{command}`", layer=layer)


def extract_command(spec: Mapping[str, Any], loader: Mapping[str, Any], sources: Sequence[str] = ("DATA",)) -> str:
    """Return the command that computes the rows of a space.

    Parameters
    ----------
    spec : mapping      the space's spec
    loader : mapping    keyword arguments of `load_backbone`, as recorded in the space
    sources : sequence of str
        Data sets, as `extract` takes them.
    """
    return shlex.join(["embedpipe", "extract", *sources, *extract_flags(spec, loader)])


def extract_flags(spec: Mapping[str, Any], loader: Mapping[str, Any]) -> list[str]:
    """Return the options of `extract` that compute the rows of a space, without those that have their default."""
    from embedpipe.backbones import load_backbone

    usual = {name: one.default for name, one in inspect.signature(load_backbone).parameters.items()}
    usual |= {"precision": "fp32", "store_dtype": "float32", "name": None}
    options = {**loader, "precision": spec["precision"], "store_dtype": spec["stored_dtype"]}
    options = {k: v for k, v in options.items() if v != usual.get(k) and k not in REMOVED_OPTIONS}
    options = {"backbone": options.pop("name", None), **options, "layer": options.pop("layer", None)}
    return [part for k, v in options.items() if v for part in (f"--{k.replace('_', '-')}", str(v))]


def loader_of(spec: Mapping[str, Any], loader: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `load_backbone` that compute further rows of a space.

    Parameters
    ----------
    spec, loader : mapping    as recorded with the rows

    Raises
    ------
    ModelMismatch    the rows were computed with `--pixels fast`, which was removed
    """
    if loader.get("pixels") == "fast":
        raise ModelMismatch(
            f"features of {spec['source']}:{spec['architecture']} were extracted with --pixels fast, which was removed: "
            "only images whose features are cached can be used",
            hint=f"extract again with `{extract_command(spec, loader)}`, then fit the head again",
        )
    return {name: value for name, value in loader.items() if name not in REMOVED_OPTIONS}


def _is_complete(manifest: Manifest, space: Space, *, every: bool = True) -> bool:
    """Whether a space has rows of the data set, by default of every image."""
    features = FeatureSet(manifest, space)
    return bool(features.splits) and not (every and features.missing)


def feature_spaces(cache: Cache) -> list[Space]:
    """Return the spaces of features, without those of activations, which only fine-tuning uses."""
    return [one for one in cache.spaces() if "cut" not in one.spec]


def _spaces_of(cache: Cache, *backbones: str | None) -> list[Space]:
    """Return the spaces of clean images of some backbones; of all for None and by default."""
    clean = [space for space in feature_spaces(cache) if not space.spec["view"]]
    names = [(space, f"{space.spec['source']}:{space.spec['architecture']}") for space in clean]
    asked = {*backbones} - {None}
    return [space for space, name in names if not asked or asked & {name, name.removeprefix("timm:")}]


def _by_model(spaces: Sequence[Space]) -> list[list[Space]]:
    """Return the spaces of each model: those whose specs differ in the layer and its pooling only."""
    models: dict[str, list[Space]] = defaultdict(list)
    for space in spaces:
        models[canonical_json(model_fields(space.spec))].append(space)
    return list(models.values())


def model_fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec without the layer and its pooling; it is the same for all spaces of one model."""
    return {name: value for name, value in spec.items() if name not in LAYER_FIELDS}


def _clean_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec without what makes a view of an image."""
    transform, added = spec["transform"], {"augment", "seed", "view"}
    if isinstance(transform, dict):  # a user's own may be a text
        transform = {k: v for k, v in transform.items() if k not in {*added, transform.get("augment")}}
    return {**spec, "transform": transform, "view": 0}


def _in_model_order(spaces: Sequence[Space]) -> list[Space]:
    """Return the spaces of one model in the order of computation; the input of the classifier comes last."""
    from embedpipe.backbones import describe_layers

    stages: list[str] = []
    with suppress(UsageError):  # a backbone passed from Python, or a folder that was removed
        stages = [stage.name for stage in describe_layers(str(spaces[0].loader.get("name")))]

    def place(space: Space) -> tuple[bool, int, list[str | int], str]:
        layer = space.spec["layer"]
        inside = (number for number, stage in enumerate(stages) if f"{layer}.".startswith(f"{stage}."))
        natural = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]
        return layer == PENULTIMATE, next(inside, len(stages)), natural, space.spec["pool"]

    return sorted(spaces, key=place)

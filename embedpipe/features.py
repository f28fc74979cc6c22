"""FeatureSet: the cached features of a data set, by split, read when asked for.

What `extract` returns and `fit_head` takes. Labels and splits come from the sample table, rows from a space, or from several
side by side; a row is read from the memory-mapped file when somebody looks at it.

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
from embedpipe.heads import Chunked
from embedpipe.provenance import canonical_json

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.cache import SpaceView


COPIES = 3  # of features, while a head is fitted: as they are read, standardised, and in bfloat16
REMOVED_OPTIONS = ("pixels",)  # of `extract`; recorded in spaces and runs
PENULTIMATE = "penultimate"  # the layer of a space by default: what enters the classifier


@dataclass(frozen=True)
class FeatureSet:
    """Features of one data set in one space, or in several whose rows stand side by side.

    manifest : Manifest     samples with label, split and group
    space : Space           where the rows are
    backbone : Backbone     what made them, where it is at hand
    summary : dict          what extracting them took (the JSON of `extract`)
    beside : tuple of Space    further spaces: their columns follow, row by row of the same image
    """

    manifest: Manifest
    space: Space
    backbone: Backbone | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[Space, ...] = ()

    @property
    def spaces(self) -> tuple[Space, ...]:
        """All of them, in the order of the columns."""
        return (self.space, *self.beside)

    def only(self, spaces: Iterable[Space]) -> FeatureSet:
        """Return the same samples with the columns of some spaces."""
        first, *others = spaces
        return replace(self, space=first, beside=tuple(others))

    def reopened(self, **asked: Any) -> FeatureSet:
        """Return what `open_features` finds for the same data set in the same cache."""
        cache = Cache(self.space.folder.parent.parent)
        return replace(open_features(cache, self.dataset, **asked), backbone=self.backbone)

    @property
    def dataset(self) -> str:
        """Name of the data set's sample table."""
        return dataset_name(self.manifest)

    @property
    def loader(self) -> dict[str, Any]:
        """Keyword arguments of `load_backbone` that made the rows; empty for a backbone handed over as an object."""
        return self.space.loader

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each space."""
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
        """Samples without a row that are not recorded failures: what another `extract` would compute."""
        views = self._views
        return sum(any(s.key not in v and s.key not in v.failures for v in views) for s in self.manifest.samples)

    @property
    def splits(self) -> dict[str, int]:
        """Count of samples with a row, by split."""
        counts = Counter(sample.split for sample in self._present)
        return {split: counts[split] for split in SPLITS if counts[split]}

    def samples(self, split: str | None = None, *, labelled: bool = False) -> tuple[Sample, ...]:
        """Return the samples that have a row, in order; of one split, and with a label, if asked so."""
        return tuple(
            sample
            for sample in self._present
            if split in (None, sample.split) and not (labelled and sample.label is None)
        )

    def paths(self, split: str | None = None) -> list[str]:
        """Return one path a row of `arrays(split)`: the DATA argument joined with the relative path."""
        return [self.manifest.name_of(s) for s in self._rows_of(split)]

    def arrays(self, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return features float32 (N, D) of a split, or of all, and class indices int64 (N,).

        Of several labels an image, float32 (N, C) of 0 and 1; of numbers, float64 (N,). In labelled data, images without a
        label are left out; in unlabelled data every index is -1.

        Raises
        ------
        UsageError    no such split
        """
        if split is not None and split not in self.splits:
            raise UsageError(
                f"no split {split!r} with features in {self.manifest.name}",
                hint=f"found {', '.join(self.splits) or 'no features at all'}",
            )
        samples = self._rows_of(split)
        return self.read(samples), self.manifest.targets(samples)

    def _rows_of(self, split: str | None) -> tuple[Sample, ...]:
        return self.samples(split, labelled=self.manifest.labelled)

    def labelled(self, *splits: str, max_bytes: float) -> tuple[np.ndarray | Chunked, np.ndarray]:
        """Return features (N, D) and targets, as `arrays` does, of the labelled images of splits.

        They come in the order in which they are stored, to be read in chunks where memory does not hold them (`fits`).
        """
        found = [sample for split in splits for sample in self.samples(split, labelled=True)]
        samples = tuple(sorted(found, key=lambda sample: sample.key))
        return self.rows(samples, max_bytes=max_bytes), self.manifest.targets(samples)

    def rows(self, samples: tuple[Sample, ...], *, max_bytes: float) -> np.ndarray | Chunked:
        """Return features (N, D) of samples that have a row, to be read in chunks where memory does not hold them (`fits`)."""
        return self.read(samples) if self.fits(max_bytes) else self.chunked(samples)

    def fits(self, max_bytes: float) -> bool:
        """Whether so much memory holds all features COPIES times."""
        return COPIES * len(self._present) * self.feature_dim * 4 <= max_bytes

    def chunked(self, samples: Sequence[Sample]) -> Chunked:
        """Return features float32 (N, D) of samples that have a row, to be read when somebody asks for them."""
        keys = [sample.key for sample in samples]

        def read(rows: Any) -> np.ndarray:
            wanted = keys[rows] if isinstance(rows, slice) else [keys[row] for row in rows]
            return self._read(wanted)

        return Chunked((len(keys), self.feature_dim), read)

    def read(self, samples: tuple[Sample, ...]) -> np.ndarray:
        """Return features float32 (N, D) of samples that have a row."""
        if not samples:
            return np.empty((0, self.feature_dim), np.float32)
        return self._read([sample.key for sample in samples])

    def _read(self, keys: Sequence[bytes]) -> np.ndarray:
        blocks = [view.read(keys).astype(np.float32, copy=False) for view in self._views]
        return np.hstack(blocks) if self.beside else blocks[0]


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
        Name, id or source path of a data set; the one extracted last when not given.
    space, backbone, layer : str or several
        Which spaces: the folder's name or a prefix, the backbone's name, the layer ("all": every one that the cache holds,
        in the order of the model). Several stand side by side. Default: the only one, or the one filled last.
    every : bool
        All spaces that hold every image and fit `backbone` and `layer`.

    Raises
    ------
    UsageError    nothing extracted yet, or what is asked for does not name one space each, or a space lacks images
    """
    manifest = cache.read_dataset(dataset)
    names, backbones, layers = _several(space), _several(backbone), _several(layer)
    if names:
        found = [cache.find_space(name) for name in names]
    elif every:
        found = _every(cache, manifest, backbones, [one for one in layers if one != "all"])
    elif len(backbones) > 1 or len(layers) > 1 or "all" in layers:
        asked = layers or (PENULTIMATE,)
        found = [one for name in backbones or (None,) for one in _of_model(cache, manifest, name, asked)]
    else:
        found = [_only_complete(cache, manifest, next(iter(backbones), None), next(iter(layers), None))]
    first, *others = {one.folder: one for one in found}.values()  # asked for twice, it stands there once
    features = FeatureSet(manifest, first, beside=tuple(others))
    for one in features.spaces:
        one.mark_used()
    return features


def _several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _only_complete(cache: Cache, manifest: Manifest, backbone: str | None, layer: str | None) -> Space:
    fitting = [one for one in feature_spaces(cache) if _fits(one, backbone, layer)]
    complete = [one for one in fitting if _holds(manifest, one)]
    if complete:
        return _pick(cache, manifest, complete)
    siblings = [one for one in feature_spaces(cache) if _fits(one, backbone, None) and _holds(manifest, one)]
    if layer and siblings:
        raise _lacking(manifest, siblings[0], layer)
    given = [(kind, name) for kind, name in (("backbone", backbone), ("layer", layer)) if name]
    asked, flags = " and ".join(map(" ".join, given)), "".join(f" --{kind} {name}" for kind, name in given)
    raise UsageError(
        f"no space holds the features of every image of {manifest.name}{asked and f' with {asked}'}",
        hint=f"run `embedpipe extract {manifest.sources[0].argument}{flags}`",
    )


def _pick(cache: Cache, manifest: Manifest, spaces: Sequence[Space]) -> Space:
    """Return the only one, or the first of the last extraction."""
    latest = (cache.latest() or {"spaces": []})["spaces"]
    newest = sorted((s for s in spaces if s.folder.name in latest), key=lambda s: latest.index(s.folder.name))
    if len(spaces) == 1 or newest:
        return (newest or spaces)[0]
    names = ", ".join(one.folder.name for one in spaces)
    raise UsageError(f"{manifest.name} has features in {len(spaces)} spaces: {names}", hint="name one with --space")


def _every(cache: Cache, manifest: Manifest, backbones: Sequence[str], layers: Sequence[str]) -> list[Space]:
    """Return all complete spaces that fit, those of a model together and in its order."""
    models: dict[str, list[Space]] = defaultdict(list)
    for one in feature_spaces(cache):
        named = not backbones or any(_fits(one, name, None) for name in backbones)
        if named and (not layers or one.spec["layer"] in layers) and not one.spec["view"] and _holds(manifest, one):
            models[_model_of(one)].append(one)
    if not models:
        raise UsageError(
            f"no space holds the features of every image of {manifest.name}",
            hint=f"run `embedpipe extract {manifest.sources[0].argument} --layer all`",
        )
    return [one for spaces in models.values() for one in _in_order(spaces)]


def _of_model(cache: Cache, manifest: Manifest, backbone: str | None, layers: Sequence[str]) -> list[Space]:
    """Return the spaces of layers of one model, in its order.

    Raises
    ------
    UsageError    there are several such models, or a layer lacks images
    """
    some = [one for one in feature_spaces(cache) if _fits(one, backbone, None) and _holds(manifest, one, every=False)]
    if not some:
        return [_only_complete(cache, manifest, backbone, None)]
    full = {one.folder for one in some if _holds(manifest, one)}
    models: dict[str, list[Space]] = defaultdict(list)
    for one in some:
        models[_model_of(one)].append(one)
    able = [m for m in models.values() if {*layers} - {"all"} <= {one.spec["layer"] for one in m if one.folder in full}]
    able = able or list(models.values())
    chosen = _pick(cache, manifest, [one for m in able for one in m]) if len(able) > 1 else able[0][0]
    held = models[_model_of(chosen)]
    wanted = list(dict.fromkeys(one.spec["layer"] for one in held)) if "all" in layers else list(dict.fromkeys(layers))
    found = []
    for layer in wanted:
        there = [one for one in held if one.spec["layer"] == layer]
        complete = [one for one in there if one.folder in full]
        if not complete:
            raise _lacking(manifest, (there or held)[0], layer)
        found.append(_pick(cache, manifest, complete))
    return _in_order(found)


def _lacking(manifest: Manifest, space: Space, layer: str) -> UsageError:
    """Return the error of images without features of a layer; `space` is one of the same model."""
    same = space.spec["layer"] == layer
    count = FeatureSet(manifest, space).missing if same else len(manifest.samples)
    sources = [source.argument for source in manifest.sources]
    command = extract_command(space.spec, {**space.loader, "layer": layer}, sources)
    return UsageError(
        f"{count} of {len(manifest.samples)} images of {manifest.name} have no features of the layer {layer}",
        hint=f"run `{command}`",
        layer=layer,
    )


def extract_command(spec: Mapping[str, Any], loader: Mapping[str, Any], sources: Sequence[str] = ("DATA",)) -> str:
    """Return the command that computes the rows of a space.

    Parameters
    ----------
    spec : mapping      the space's spec
    loader : mapping    keyword arguments of `load_backbone`, as recorded in the space
    sources : sequence of str
        Data sets, as `extract` takes them.
    """
    from embedpipe.backbones import load_backbone

    usual = {name: one.default for name, one in inspect.signature(load_backbone).parameters.items()}
    usual |= {"precision": "fp32", "store_dtype": "float32", "name": None}
    options = {**loader, "precision": spec["precision"], "store_dtype": spec["stored_dtype"]}
    options = {k: v for k, v in options.items() if v != usual.get(k) and k not in REMOVED_OPTIONS}
    options = {"backbone": options.pop("name", None), **options, "layer": options.pop("layer", None)}
    flags = [part for k, v in options.items() if v for part in (f"--{k.replace('_', '-')}", str(v))]
    return shlex.join(["embedpipe", "extract", *sources, *flags])


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


def _holds(manifest: Manifest, space: Space, *, every: bool = True) -> bool:
    """Whether a space has clean rows of the data set; of every image."""
    features = FeatureSet(manifest, space)
    return bool(features.splits) and not (every and features.missing)


def feature_spaces(cache: Cache) -> list[Space]:
    """Return the spaces of features; those of activations at a cut are for fine-tuning alone."""
    return [one for one in cache.spaces() if "cut" not in one.spec]


def _fits(space: Space, backbone: str | None, layer: str | None) -> bool:
    name = f"{space.spec['source']}:{space.spec['architecture']}"
    named = backbone is None or backbone in (name, name.removeprefix("timm:"))
    return named and (layer is None or layer == space.spec["layer"])


def _model_of(space: Space) -> str:
    """Return what spaces of the layers of one model have in common."""
    return canonical_json({k: v for k, v in space.spec.items() if k not in ("layer", "pool")})


def _in_order(spaces: Sequence[Space]) -> list[Space]:
    """Return spaces of one model in the order in which it computes them; what enters the classifier comes last."""
    from embedpipe.backbones import describe_layers

    stages: list[str] = []
    with suppress(UsageError):  # handed over from Python, or a folder that is not there any more
        stages = [stage.name for stage in describe_layers(str(spaces[0].loader.get("name")))]

    def place(space: Space) -> tuple[bool, int, list[str | int], str]:
        layer = space.spec["layer"]
        inside = (number for number, stage in enumerate(stages) if f"{layer}.".startswith(f"{stage}."))
        natural = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]
        return layer == PENULTIMATE, next(inside, len(stages)), natural, space.spec["pool"]

    return sorted(spaces, key=place)

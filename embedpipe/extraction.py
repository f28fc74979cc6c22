"""extract: every image through a frozen backbone once, its features into the cache.

>>> features = extract("data/", "timm:resnet18", cache_dir="cache")
>>> X, y = features.arrays("train")
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, EmbedpipeWarning

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.cache import Cache, KeyIndex, Space
    from embedpipe.features import FeatureSet
    from embedpipe.manifest import Manifest
    from embedpipe.pipeline import Filled, Progress

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Extracted:
    """One space after the deed: the backbone (its name alone where nothing was computed), where it is, what it took."""

    name: str
    backbone: Backbone | None
    space: Space
    filled: Filled

    def to_dict(self) -> dict[str, Any]:
        return {
            "backbone": self.name,
            "layer": self.space.spec["layer"],
            "fingerprint": self.space.fingerprint,
            "space": str(self.space.folder),
            "features": str(self.space.features_path),
            "feature_dim": self.space.feature_dim,
            "rows": len(self.space.view()),
            "computed": self.filled.computed,
            "reused": self.filled.reused,
            "pending_shards": self.space.pending_shards,
            "failed": [vars(failure) for failure in self.filled.failed],
            "bottleneck": self.filled.bottleneck,
            "executor": self.filled.executor,
            "executor_difference": self.filled.difference,
        }


def extract(
    data: PathLike | Sequence[PathLike],
    backbone: str | Backbone | Sequence[str] = "timm:resnet18",
    *,
    weights: str = "pretrained",
    layer: tuple[str, ...] = (),
    pool: Literal["auto", "avg", "cls", "max", "none"] = "auto",
    image_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None,
    pixels: Literal["exact", "fast"] = "exact",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    store_dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
    executor: Literal["auto", "eager", "compile", "openvino"] = "auto",
    workers: int | Literal["auto"] = "auto",
    split_by: Literal["auto", "folder", "column", "hash"] = "auto",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    limit: int | None = None,
    shard_rows: int = 1024,
    retry_failed: bool = False,
    strict: bool = False,
    allow_outside: bool = False,
    cache_dir: PathLike = "cache",
    seed: int = 0,
    progress: Progress | None = None,
) -> FeatureSet:
    """Compute the features of every image that the cache does not hold yet.

    Parameters
    ----------
    data : path or several
        Class folders (with or without train/ val/ test/), a flat folder, a CSV, TSV, JSONL or Parquet manifest, Parquet files of
        images, .tar shards ("s-{000..012}.tar"), an s3:// or other URL of one of these, or hf:NAME[:CONFIG][@SPLIT].
    backbone : str, Backbone or several names
        timm:NAME, torchvision:NAME, or the model/ folder of a fine-tuned run.
    weights : str
        pretrained (from the library's hub), packaged (from an installed package), none (seeded random), or a file.
    layer : tuple of str
        Layer to take features from, pooled; repeatable; all means every stage. Default: what enters the classifier.
    pool : str
        How maps and tokens become one vector; auto averages what is not class or register token.
    image_size : int
        Side of the network's input in pixels. Default: the model's own.
    crop_pct : float
        Share of the resized image that the centre crop keeps. Default: the model's own.
    interpolation : str
        Resize filter. Default: the model's own.
    pixels : str
        exact, or fast: only the part that the crop keeps is resized; a pixel may be off by one grey level.
    precision : str
        Arithmetic of the forward pass.
    store_dtype : str
        How features are stored.
    batch_size : int or auto
        Images a forward pass. Never changes a feature's identity.
    device : str
        auto, cpu, cuda, cuda:K or mps. A device that is not there is an error.
    executor : str
        What carries images through the backbone; auto measures which is worth its warm-up for the images ahead.
    workers : int or auto
        Decoding processes.
    split_by : str
        Where train, val and test come from: auto takes folders or a column when there are some, else a hash of the content.
    val_fraction : float
        Share of the samples that a hash split puts into val.
    test_fraction : float
        Share of the samples that a hash split puts into test.
    limit : int
        Only the first N images.
    shard_rows : int
        Rows committed at a time.
    retry_failed : bool
        Decode again what is recorded as a failure.
    strict : bool
        Exit with 1, not 3, when an image failed.
    allow_outside : bool
        Let a manifest name files outside its own folder.

    Returns
    -------
    FeatureSet
        Of the first space; `summary` tells of all.

    Raises
    ------
    UsageError      the data, a name or an option is wrong
    StorageError    the disk is full or refuses
    CacheBusy       another process writes the same space
    """
    from embedpipe.cache import Cache, KeyIndex
    from embedpipe.features import FeatureSet

    start, cache = time.monotonic(), Cache(Path(cache_dir))
    reading: dict[str, Any] = {"split_by": split_by, "limit": limit, "allow_outside": allow_outside}
    reading |= {"val_fraction": val_fraction, "test_fraction": test_fraction}
    shape = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation, "pixels": pixels}
    loader = {"weights": weights, "seed": seed, "pool": pool, **shape}
    settings: dict[str, Any] = {"precision": precision, "store_dtype": store_dtype}
    settings |= {"device": device, "batch_size": batch_size, "workers": workers, "executor": executor}
    writing = {"shard_rows": shard_rows, "retry_failed": retry_failed, "progress": progress}
    with closing(KeyIndex()) as index:
        manifest = _read(data, index, **reading)
        wishes = [Wish(name, one, loader, settings) for name in _as_list(backbone) for one in layer or (None,)]
        extracted = _extract(cache, index, manifest, wishes, settings, writing)
    dataset = cache.write_dataset(manifest)
    cache.set_latest(dataset, [one.space.folder.name for one in extracted])
    summary = _summarise(manifest, dataset, extracted, time.monotonic() - start)
    if strict and summary["failed"]:
        raise _refusal(summary)
    return FeatureSet(manifest, extracted[0].space, extracted[0].backbone, summary)


def _as_list(backbone: str | Backbone | Sequence[str]) -> list[Any]:
    several = isinstance(backbone, Sequence) and not isinstance(backbone, str)
    return list(backbone) if several else [backbone]  # type: ignore[arg-type]


def _read(data: PathLike | Sequence[PathLike], index: KeyIndex, **options: Any) -> Manifest:
    """Return the manifest of the sources, its warnings told."""
    from embedpipe.manifest import read_manifest

    sources = [data] if isinstance(data, str | os.PathLike) else list(data)
    manifest = read_manifest(sources, key_of=index.key_of, **options)
    for warning in manifest.warnings:
        warnings.warn(warning, EmbedpipeWarning, stacklevel=3)
    return manifest


@dataclass(frozen=True)
class Wish:
    """One layer of one backbone, as asked for: a name (or a backbone handed over from Python) and how to load it."""

    backbone: str | Backbone
    layer: str | None
    shape: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def named(self) -> bool:
        return not hasattr(self.backbone, "spec")

    @property
    def loader(self) -> dict[str, Any]:
        """Keyword arguments of `load_backbone`; empty where the backbone came as an object."""
        return {"name": self.backbone, **self.shape, "layer": self.layer} if self.named else {}

    @property
    def question(self) -> str:
        from embedpipe.recall import question_of

        return question_of(self.loader, self.settings)


def _extract(
    cache: Cache,
    index: KeyIndex,
    manifest: Manifest,
    wishes: Sequence[Wish],
    settings: Mapping[str, Any],
    writing: Mapping[str, Any],
) -> list[Extracted]:
    """Fill the spaces that are wished for, in order; backbones are loaded only where there is something to do."""
    models = Models(index)
    wishes = [one for wish in wishes for one in models.expand(wish)]
    done = {n: found for n, wish in enumerate(wishes) if (found := _reuse(cache, index, manifest, wish, writing))}
    rest = [n for n in range(len(wishes)) if n not in done]
    if rest:
        done |= zip(rest, _fill(cache, manifest, models, [wishes[n] for n in rest], settings, writing), strict=True)
    return [done[n] for n in range(len(wishes))]


def _reuse(
    cache: Cache, index: KeyIndex, manifest: Manifest, wish: Wish, writing: Mapping[str, Any]
) -> Extracted | None:
    """Return a space that has every row already, None where it takes a model to tell."""
    from embedpipe.pipeline import reuse_space, space_name
    from embedpipe.recall import recall

    known = recall(index, wish.question) if wish.named else None
    if known is None:
        return None
    space = cache.open_space(known.spec, name=space_name(known.spec))
    filled = reuse_space(space, manifest, known.record, retry_failed=writing["retry_failed"])
    if filled is None:
        space.ensure_free()  # before a model is loaded in vain
    return Extracted(known.name, None, space, filled) if filled else None


def _fill(
    cache: Cache,
    manifest: Manifest,
    models: Models,
    wishes: Sequence[Wish],
    settings: Mapping[str, Any],
    writing: Mapping[str, Any],
) -> list[Extracted]:
    """Load what is wished for and compute what is missing, all together."""
    from embedpipe.drift import record_environment
    from embedpipe.forwarding import plan_forward
    from embedpipe.pipeline import Target, fill_spaces, space_name, space_spec
    from embedpipe.recall import remember

    forward, targets = plan_forward(**settings), []
    for wish in wishes:
        loaded = models.load(wish)
        spec = space_spec(loaded, forward.precision, forward.store_dtype)
        targets.append(Target(cache.open_space(spec, name=space_name(spec)), loaded, wish.loader))
        if wish.named:
            remember(models.index, wish.question, loaded, spec, record_environment(forward, wish.loader))
    filled = fill_spaces(targets, manifest, forward, graphs=cache.graphs_folder, **writing)
    return [
        Extracted(target.backbone.name, target.backbone, target.space, one)
        for target, one in zip(targets, filled, strict=True)
    ]


class Models:
    """Backbones by name, each loaded once however many of its layers are asked for."""

    def __init__(self, index: KeyIndex) -> None:
        self.index = index
        self._loaded: dict[str, Backbone] = {}

    def load(self, wish: Wish) -> Backbone:
        """Return the backbone of a wish; those of one name share the model."""
        from embedpipe.backbones import Backbone, at_layer, load_backbone

        if isinstance(wish.backbone, Backbone):
            return at_layer(wish.backbone, wish.layer) if wish.layer else wish.backbone
        known = self._loaded.get(wish.backbone)
        if known is None:
            known = self._loaded[wish.backbone] = load_backbone(**wish.loader)
            return known
        return at_layer(known, wish.layer, pool=wish.shape["pool"])

    def expand(self, wish: Wish) -> list[Wish]:
        """Return a wish for each stage of the model where all are asked for."""
        from embedpipe.recall import recall_layers, remember_layers

        if wish.layer != "all":
            return [wish]
        layers = recall_layers(self.index, wish.question) if wish.named else None
        if layers is None:
            backbone = self.load(replace(wish, layer=None))
            layers = tuple(layer.name for layer in backbone.layers)
            if wish.named:
                remember_layers(self.index, wish.question, backbone)
        return [replace(wish, layer=layer) for layer in layers]


def _refusal(summary: Mapping[str, Any]) -> EmbedpipeError:
    failed = summary["failed"]
    first = f"first {failed[0]['path']}: {failed[0]['reason']}"
    return EmbedpipeError(
        f"{len(failed)} of {summary['images']} images failed, {first}",
        hint="mend or remove them, or run without --strict",
        failed=failed,
    )


def _summarise(manifest: Manifest, dataset: str, extracted: Sequence[Extracted], seconds: float) -> dict[str, Any]:
    """Return the JSON of the verb; the scalars of the first space are mirrored at the top."""
    spaces = [one.to_dict() for one in extracted]
    computed = sum(space["computed"] for space in spaces)
    return {
        **spaces[0],
        "dataset": dataset,
        "spaces": spaces,
        "images": len(manifest.samples) + len(manifest.unreadable),
        "ignored": manifest.ignored,
        "classes": list(manifest.classes),
        "splits": manifest.splits,
        "seconds": round(seconds, 3),
        "images_per_second": round(computed / seconds, 2),
    }

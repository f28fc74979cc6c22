"""extract: compute the features of images with frozen backbones, once, and store them in the cache.

Six types of this package and of `inference` carry an image from the command to its committed row: `SpaceResolver` finds the
space of each request, `FeatureRequest` is a space with its backbone, `Lookup` has the samples without a row,
`InferenceSettings` says how this machine computes, `Runner` computes, and `Rows` are its results. Other packages provide
`Manifest`, `Sample` and `ByteSource` (data), `Batch` (images) and `SpaceWriter` (cache).

>>> features = extract("data/", "timm:resnet18", cache_dir="cache")
>>> X, y = features.arrays("train")
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, check_pixels_option, check_removed_option, warn
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.cache import KeyIndex
    from embedpipe.data import Manifest
    from embedpipe.features import FeatureSet
    from embedpipe.inference import Progress


def extract(
    data: PathLike | Sequence[PathLike],
    backbone: str | Backbone | Sequence[str] = "timm:resnet18",
    *,
    weights: str = "pretrained",
    layer: tuple[str, ...] | str = (),
    pool: Literal["auto", "avg", "cls", "max", "none"] = "auto",
    image_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None,
    pixels: Literal["exact", "fast"] | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    store_dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
    executor: Literal["auto", "eager", "fused", "compile", "openvino"] = "auto",
    workers: int | Literal["auto"] = "auto",
    split_by: Literal["auto", "folder", "column", "hash"] = "auto",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    limit: int | None = None,
    shard_rows: int = 1024,
    retry_failed: bool = False,
    strict: bool = False,
    allow_outside: bool = False,
    views: int = 0,
    augment: Literal["flip", "standard", "strong"] = "standard",
    dry_run: bool = False,
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
    layer : str or several
        Layer whose pooled output is the feature; repeatable; all: every stage. Default: penultimate, the input of the classifier.
    pool : str
        How maps and tokens become one vector; auto averages all tokens except class and register tokens.
    image_size : int
        Side of the network's input in pixels. Default: the model's own.
    crop_pct : float
        Fraction of the resized image that the centre crop keeps. Default: the model's own.
    interpolation : str
        Resize filter. Default: the model's own.
    pixels : str
        No longer used: images are always resized exactly.
    precision : str
        Precision of the forward pass.
    store_dtype : str
        Data type of the stored features.
    batch_size : int or auto
        Images per forward pass; not part of the identity of a feature.
    device : str
        auto, cpu, cuda, cuda:K or mps; a device that is not available is an error.
    executor : str
        What runs the backbone. auto: the one expected to finish these images first; fused: no longer used, means auto.
    workers : int or auto
        Decoding processes.
    split_by : str
        Source of the splits; auto: folders or a column if there are any, else a hash of the content.
    val_fraction : float
        Fraction of the samples that a hash split puts into val.
    test_fraction : float
        Fraction of the samples that a hash split puts into test.
    limit : int
        Only the first N images.
    shard_rows : int
        Rows committed at a time.
    retry_failed : bool
        Decode images again that are recorded as failures.
    strict : bool
        Exit with 1, not 3, when an image failed.
    allow_outside : bool
        Allow a manifest to name files outside its own folder.
    views : int
        Number of augmented views of each training image, each stored in a space of its own.
    augment : str
        Augmentation of the views: flip; standard (flip and random crop); strong (RandAugment and erasing too).
    dry_run : bool
        Report what would be computed, its size and the expected time; write nothing.

    Returns
    -------
    FeatureSet
        Of the first space; `summary` describes all.

    Raises
    ------
    UsageError      the data, a name or an option is wrong
    StorageError    the disk is full or refuses
    CacheBusy       another process writes the same space
    """
    from embedpipe.cache import Cache, KeyIndex
    from embedpipe.commands.extract._report import describe, describe_plan
    from embedpipe.commands.extract._requests import SpaceResolver, complete_spaces, plan_spaces
    from embedpipe.features import FeatureSet

    check_pixels_option(pixels)
    start, cache = time.monotonic(), Cache(Path(cache_dir))
    reading: dict[str, Any] = {"split_by": split_by, "limit": limit, "allow_outside": allow_outside}
    reading |= {"val_fraction": val_fraction, "test_fraction": test_fraction}
    transform = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
    options = {"weights": weights, "seed": seed, "pool": pool, **transform}
    settings: dict[str, Any] = {"precision": precision, "store_dtype": store_dtype, "device": device}
    settings |= {"batch_size": batch_size, "workers": workers, "executor": _existing(executor)}
    with closing(KeyIndex(keep=not dry_run)) as index:
        manifest = _read(data, index, **reading)
        resolver = SpaceResolver(cache, index, options, settings, augment)
        requests = resolver.expand(_as_list(backbone), _as_list(layer), views)
        if dry_run:
            spaces, run = plan_spaces(resolver, requests, manifest, retry_failed=retry_failed)
            return FeatureSet(manifest, spaces[0][0], None, describe_plan(manifest, spaces, run))
        writing: dict[str, Any] = {"shard_rows": shard_rows, "retry_failed": retry_failed, "progress": progress}
        results = complete_spaces(resolver, requests, manifest, **writing)
    dataset = cache.write_dataset(manifest)
    cache.set_latest(dataset, [space.folder.name for _, _, space, _ in results])
    summary = describe(manifest, dataset, results, time.monotonic() - start)
    if strict and summary["failed"]:
        raise _refusal(summary)
    return FeatureSet(manifest, space=results[0][2], backbone=results[0][1], summary=summary)


def _existing(executor: str) -> str:
    """Return an executor that exists: auto, with a warning, for the removed one."""
    if executor != "fused":
        return executor
    reason = "it was removed, and auto chooses among the others"
    check_removed_option("--executor fused", executor, harmless=("fused",), reason=reason)
    return "auto"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _read(data: PathLike | Sequence[PathLike], index: KeyIndex, **options: Any) -> Manifest:
    """Return the manifest of the sources, and issue its warnings."""
    from embedpipe.data import read_manifest

    manifest = read_manifest(data, key_of=index.key_of, **options)
    for warning in manifest.warnings:
        warn(warning)
    return manifest


def _refusal(summary: Mapping[str, Any]) -> EmbedpipeError:
    failed = summary["failed"]
    first = f"first {failed[0]['path']}: {failed[0]['reason']}"
    message = f"{len(failed)} of {summary['images']} images failed, {first}"
    return EmbedpipeError(message, hint="repair or remove them, or run without --strict", failed=failed)

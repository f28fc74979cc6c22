"""extract: every image through a frozen backbone once, its features into the cache.

>>> features = extract("data/", "timm:resnet18", cache_dir="cache")
>>> X, y = features.arrays("train")
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, check_pixels_option, check_removed_option
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.cache import KeyIndex
    from embedpipe.commands.extract._requests import Extracted, Wish, Workshop
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
        Layer to take features from, pooled; repeatable; all means every stage. Default: penultimate, what enters the classifier.
    pool : str
        How maps and tokens become one vector; auto averages what is not class or register token.
    image_size : int
        Side of the network's input in pixels. Default: the model's own.
    crop_pct : float
        Share of the resized image that the centre crop keeps. Default: the model's own.
    interpolation : str
        Resize filter. Default: the model's own.
    pixels : str
        No longer used: images are always resized exactly.
    precision : str
        Arithmetic of the forward pass.
    store_dtype : str
        How features are stored.
    batch_size : int or auto
        Images a forward pass. Never changes a feature's identity.
    device : str
        auto, cpu, cuda, cuda:K or mps. A device that is not there is an error.
    executor : str
        What runs the backbone. auto: the one expected to finish these images first; fused: no longer used, means auto.
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
    views : int
        Augmented views of each training image beside the clean one, each in a space of its own.
    augment : str
        What makes a view: flip; standard (a random crop too); strong (RandAugment and erasing too).
    dry_run : bool
        Say what would be computed, how large it is and how long it takes; write nothing.

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
    from embedpipe.commands.extract._report import describe, describe_plan
    from embedpipe.commands.extract._requests import Workshop
    from embedpipe.features import FeatureSet

    check_pixels_option(pixels)
    start, cache = time.monotonic(), Cache(Path(cache_dir))
    reading: dict[str, Any] = {"split_by": split_by, "limit": limit, "allow_outside": allow_outside}
    reading |= {"val_fraction": val_fraction, "test_fraction": test_fraction}
    shape = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
    loader = {"weights": weights, "seed": seed, "pool": pool, **shape}
    settings: dict[str, Any] = {"precision": precision, "store_dtype": store_dtype}
    settings |= {"device": device, "batch_size": batch_size, "workers": workers, "executor": _existing(executor)}
    writing = {"shard_rows": shard_rows, "retry_failed": retry_failed, "progress": progress}
    with closing(KeyIndex(keep=not dry_run)) as index:
        manifest = _read(data, index, **reading)
        workshop = Workshop(cache, index, settings)
        wishes = workshop.wishes_of(_as_list(backbone), tuple(_as_list(layer)), loader, views=views, augment=augment)
        if dry_run:
            planned = workshop.plan(wishes, manifest, retry_failed=retry_failed)
            return FeatureSet(manifest, planned.spaces[0].space, None, describe_plan(manifest, planned))
        extracted = _fulfil(workshop, wishes, manifest, **writing)
    dataset = cache.write_dataset(manifest)
    cache.set_latest(dataset, [one.space.folder.name for one in extracted])
    summary = describe(manifest, dataset, extracted, time.monotonic() - start)
    if strict and summary["failed"]:
        raise _refusal(summary)
    return FeatureSet(manifest, extracted[0].space, extracted[0].backbone, summary)


def _fulfil(workshop: Workshop, wishes: Sequence[Wish], manifest: Manifest, **writing: Any) -> list[Extracted]:
    """Return the space of each wish, complete; models are loaded only for those that are not so already."""
    again = writing["retry_failed"]
    done = {n: found for n, wish in enumerate(wishes) if (found := workshop.reuse(wish, manifest, retry_failed=again))}
    rest = [n for n in range(len(wishes)) if n not in done]
    if rest:
        done |= zip(rest, workshop.fill([wishes[n] for n in rest], manifest, **writing), strict=True)
    return [done[n] for n in range(len(wishes))]


def _existing(executor: str) -> str:
    """Return an executor that exists: auto, with a warning, for the removed one."""
    if executor != "fused":
        return executor
    reason = "it was removed, and auto chooses among the others"
    check_removed_option("--executor fused", executor, harmless=("fused",), reason=reason)
    return "auto"


def _as_list(backbone: str | Backbone | Sequence[str]) -> list[Any]:
    several = isinstance(backbone, Sequence) and not isinstance(backbone, str)
    return list(backbone) if several else [backbone]  # type: ignore[arg-type]


def _read(data: PathLike | Sequence[PathLike], index: KeyIndex, **options: Any) -> Manifest:
    """Return the manifest of the sources, its warnings told."""
    from embedpipe.data import read_manifest

    manifest = read_manifest(data, key_of=index.key_of, **options)
    for warning in manifest.warnings:
        warnings.warn(warning, EmbedpipeWarning, stacklevel=3)
    return manifest


def _refusal(summary: Mapping[str, Any]) -> EmbedpipeError:
    failed = summary["failed"]
    first = f"first {failed[0]['path']}: {failed[0]['reason']}"
    return EmbedpipeError(
        f"{len(failed)} of {summary['images']} images failed, {first}",
        hint="mend or remove them, or run without --strict",
        failed=failed,
    )

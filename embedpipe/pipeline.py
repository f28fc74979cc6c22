"""Rows for whoever asks: from a manifest to keys, to what the cache holds, and for the rest decode, forward and commit.

Deeds enter here. torch is imported when the first batch is about to run, not before: a run that finds every row in the
cache decodes nothing and forwards nothing.

>>> filled = fill_space(space, manifest, backbone, Forward(device="cpu"))
>>> filled.computed, filled.reused
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Space
from embedpipe.disk import check_free_space
from embedpipe.errors import UsageError
from embedpipe.images import DECODER, image_batches
from embedpipe.manifest import Failure, Manifest, Sample
from embedpipe.provenance import environment

if TYPE_CHECKING:
    import torch

    from embedpipe.backbones import Backbone

Progress = Callable[[str, int, int], None]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NON_FINITE = "the features are not finite in {precision}; try --precision fp32 --store-dtype float32"


@dataclass(frozen=True)
class Forward:
    """How images go through a backbone. Precision and stored dtype shape a feature; the rest does not.

    batch_size : int      images a batch; the last one is padded, so that no row depends on its place
    workers : int         decoding threads
    threads : int         threads of one forward pass on a CPU
    channels_last : bool  memory format of images and weights
    """

    device: str = "cpu"
    precision: str = "fp32"
    store_dtype: str = "float32"
    batch_size: int = 32
    workers: int = 2
    threads: int = 0
    channels_last: bool = True

    @property
    def pins(self) -> dict[str, Any]:
        """What must not change until an extraction is complete, for the same bits."""
        return {
            "executor": "eager",
            "batch_size": self.batch_size,
            "threads": self.threads,
            "channels_last": self.channels_last,
        }

    def pinned(self, pins: Mapping[str, Any]) -> Forward:
        """Return these settings under the pins of an extraction that was interrupted."""
        return replace(self, **{name: pins[name] for name in self.pins if name != "executor"})


@dataclass(frozen=True)
class Rows:
    """Features of one batch.

    keys : list of bytes               (n)
    features : float32|float16 (n, D)
    failures : list                    (key, stage, reason) each
    waited_s, forward_s : float        seconds spent waiting for decoded images, and in the backbone
    """

    keys: list[bytes]
    features: np.ndarray
    failures: list[tuple[bytes, str, str]]
    waited_s: float = 0.0
    forward_s: float = 0.0

    def __len__(self) -> int:
        return len(self.keys) + len(self.failures)


@dataclass(frozen=True)
class Filled:
    """What filling a space took: rows computed, rows found there, failures of this data set, and where the time went."""

    computed: int
    reused: int
    failed: tuple[Failure, ...]
    waited_s: float
    forward_s: float

    @property
    def bottleneck(self) -> str:
        """The stage that set the pace: `decode`, `forward`, or `none` when nothing was computed."""
        if not self.computed:
            return "none"
        return "decode" if self.waited_s > self.forward_s else "forward"


def plan_forward(
    *, device: str, batch_size: int | str, workers: int | str, precision: str = "fp32", store_dtype: str = "float32"
) -> Forward:
    """Turn what a user asked for into settings of this machine.

    Raises
    ------
    UsageError    the device is not there (there is no silent fall-back), or a number is below 1
    """
    device = resolve_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, value in (("batch-size", batch_size), ("workers", workers)):
        if value != "auto" and int(value) < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more")
    import torch

    return Forward(
        device=device,
        precision=precision,
        store_dtype=store_dtype,
        batch_size=(32 if device == "cpu" else 128) if batch_size == "auto" else int(batch_size),
        workers=cores if workers == "auto" else int(workers),
        threads=torch.get_num_threads(),
    )


def resolve_device(device: str) -> str:
    """Return the device to use: `auto` means the first of cuda, mps, cpu that is there.

    Raises
    ------
    UsageError    it is not there
    """
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count())), *there]
    if device == "auto":
        return there[0]
    if device not in there:
        raise UsageError(f"--device {device} is not there; found {', '.join(there)}", hint="use --device auto")
    return device


def space_spec(backbone: Backbone, precision: str, store_dtype: str) -> dict[str, Any]:
    """Return all that shapes a row: what the fingerprint of a space is taken from."""
    return {**backbone.spec, "precision": precision, "stored_dtype": store_dtype, "view": 0}


def space_name(spec: Mapping[str, Any]) -> str:
    """Return the readable prefix of a space's folder, such as `timm-resnet18`."""
    return re.sub(r"[^\w.+-]+", "-", f"{spec['source']}-{spec['architecture']}")


def fill_space(
    space: Space,
    manifest: Manifest,
    backbone: Backbone,
    forward: Forward,
    *,
    shard_rows: int = 1024,
    retry_failed: bool = False,
    progress: Progress | None = None,
    loader: Mapping[str, Any] | None = None,
) -> Filled:
    """Compute the rows of `manifest` that `space` lacks, and commit them shard by shard.

    Parameters
    ----------
    loader : mapping
        How the backbone was named; recorded beside the features so that a head can load it again.

    Raises
    ------
    StorageError    the disk cannot hold what is planned, or refused while writing
    CacheBusy       somebody else writes to this space
    """
    wanted: dict[bytes, Sample] = {}
    for sample in manifest.samples:
        wanted.setdefault(sample.key, sample)
    view = space.view()
    missing = _missing(wanted, view, retry_failed)
    passing: dict[bytes, tuple[str, str]] = {}
    waited_s = forward_s = 0.0
    if missing or space.interrupted:
        _check_plan(space, len(missing), backbone, forward)
        with space.writer(
            feature_dim=backbone.feature_dim,
            dtype=forward.store_dtype,
            environment={**environment(forward.device), "loader": dict(loader or {})},
            pins=forward.pins,
            shard_rows=shard_rows,
        ) as writer:
            view = space.view()
            missing = _missing(wanted, view, retry_failed)
            writer.forget_failures([key for key in missing if key in view.failures])
            report = _reporter(progress, "extract", len(missing))
            items = [(key, manifest.file_of(sample)) for key, sample in missing.items()]
            for rows in stream_rows(items, backbone, forward.pinned(writer.pins)):
                writer.append(rows.keys, rows.features)
                for key, stage, reason in rows.failures:
                    if stage == "decode":
                        writer.fail(key, stage, reason, DECODER)
                    else:
                        passing[key] = (stage, reason)
                waited_s, forward_s = waited_s + rows.waited_s, forward_s + rows.forward_s
                report(len(rows))
            writer.finish()
        view = space.view()
    reasons = {key: (stage, reason) for key, (stage, reason, _) in view.failures.items()} | passing
    failed = tuple(
        Failure(manifest.name_of(sample), *reasons[sample.key]) for sample in manifest.samples if sample.key in reasons
    )
    computed = sum(key not in reasons for key in missing)
    reused = sum(key not in reasons for key in wanted) - computed
    return Filled(computed, reused, (*manifest.unreadable, *failed), waited_s, forward_s)


def _missing(wanted: Mapping[bytes, Sample], view: Any, retry_failed: bool) -> dict[bytes, Sample]:
    return {
        key: sample for key, sample in wanted.items() if key not in view and (retry_failed or key not in view.failures)
    }


def _check_plan(space: Space, rows: int, backbone: Backbone, forward: Forward) -> None:
    """Refuse a plan that the disk cannot hold: the new rows once in shards and once in the compacted file."""
    row_bytes = backbone.feature_dim * np.dtype(forward.store_dtype).itemsize + 32
    held = space.features_path.stat().st_size if space.features_path.exists() else 0
    check_free_space(space.folder, 2 * rows * row_bytes + min(held, 1 << 30))


def stream_rows(items: Iterable[tuple[bytes, Path]], backbone: Backbone, forward: Forward) -> Iterator[Rows]:
    """Decode and forward images batch by batch, in the order given.

    Yields
    ------
    Rows    of at most `forward.batch_size` images; rows that are not finite are failures, stage `forward`
    """
    import torch

    if forward.threads:
        torch.set_num_threads(forward.threads)
    run = prepare_forward(backbone, forward)
    reason = NON_FINITE.format(precision=forward.precision)
    start = time.monotonic()
    for batch in image_batches(items, backbone.transform, batch_size=forward.batch_size, workers=forward.workers):
        decoded = time.monotonic()
        keys, failures = batch.keys, list(batch.failures)
        features = np.empty((0, backbone.feature_dim), forward.store_dtype)
        if keys:
            with np.errstate(over="ignore"):
                features = run(_pad(batch.images, forward.batch_size))[: len(keys)].astype(forward.store_dtype)
            finite: np.ndarray = np.asarray(np.isfinite(features).all(axis=1))
            failures += [(key, "forward", reason) for key, ok in zip(keys, finite.tolist(), strict=True) if not ok]
            keys, features = ([key for key, ok in zip(keys, finite.tolist(), strict=True) if ok], features[finite])
        waited_s, start = decoded - start, time.monotonic()
        yield Rows(keys, features, failures, waited_s, start - decoded)
        start = time.monotonic()


def _pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """Fill a batch up to its full size with black images: a row's bits depend on the size of its batch."""
    import torch

    if len(images) == size:
        return images
    return torch.cat([images, images.new_zeros(size - len(images), *images.shape[1:])])


def prepare_forward(backbone: Backbone, forward: Forward) -> Callable[[torch.Tensor], np.ndarray]:
    """Return a function from images float32 (N, 3, H, W) to features float32 (N, D) under these settings."""
    import torch

    memory = torch.channels_last if forward.channels_last else torch.contiguous_format
    module = backbone.module.to(forward.device).to(memory_format=memory)
    dtype = getattr(torch, DTYPES[forward.precision])

    def run(images: torch.Tensor) -> np.ndarray:
        images = images.to(forward.device, memory_format=memory)
        with (
            torch.inference_mode(),
            torch.autocast(forward.device.partition(":")[0], dtype, enabled=dtype is not torch.float32),
        ):
            features: np.ndarray = module(images).float().cpu().numpy()
        return features

    return run


def _reporter(progress: Progress | None, label: str, total: int) -> Callable[[int], None]:
    """Return a function that adds to a count and tells `progress`."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(label, done, total)

    report(0)
    return report

"""Decide whether training reads images or cached activations, from the options, the model, the disk and measured times.

>>> source, report = choose_source(network, images, options, cache, None, progress=None)
>>> report["cut"], report["activations"]["reason"]
"""

from __future__ import annotations

import os
import shutil
import timeit
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from embedpipe.backbones import unfreeze_parameters
from embedpipe.cache import Cache
from embedpipe.classifier.network import Network
from embedpipe.commands.finetune._activations import ActivationCache, cut_backbone
from embedpipe.commands.finetune._phases import phases_of
from embedpipe.commands.finetune._sources import ImageSource, TrainingSource
from embedpipe.errors import UsageError
from embedpipe.inference import Progress, look_up, row_bytes
from embedpipe.storage import BYTES, TEMPORARY, format_size, make_folder, parse_amount, storage_errors

FLOAT16_TOLERANCE = 0.05  # of the largest logit
RESERVED_BYTES = 1 << 30  # of the disk
READ_TEST_BYTES = 16 << 20
NOTHING_CACHED = {"cached": False, "rows": 0, "bytes": 0, "reused": 0}


class NotCached(Exception):
    """The reason why activations are not cached."""


def choose_source(
    network: Network,
    images: ImageSource,
    options: Mapping[str, Any],
    cache: Cache,
    stored: Mapping[str, Any] | None,
    *,
    progress: Progress | None,
) -> tuple[TrainingSource, dict[str, Any]]:
    """Return the source to train on, and the `cut` and `activations` of the report.

    Where activations are cached, the network's backbone is replaced by the tail of the cut. The first of several ranks
    decides and computes.

    Parameters
    ----------
    stored : dict    what this function reported when the run that is resumed began

    Raises
    ------
    UsageError    --cache-activations on, and the activations cannot be computed or do not fit
    """
    if options["views"] and options["augment"] == "none":
        raise UsageError(f"--views {options['views']} without --augment", hint="try --augment flip, standard or strong")
    max_bytes = parse_amount(options["max_cache_size"], BYTES, "--max-cache-size", "20GB")
    if stored:
        options = {**options, "cache_activations": "on" if stored["activations"]["cached"] else "off"}
    dtype = stored["activations"].get("stored_dtype") if stored else None
    try:
        activations = _find_activations(images, options, cache)
        report = images.ranks.broadcast(lambda: _cache(network, activations, options, max_bytes, dtype, progress))
        if not report["cached"]:
            raise NotCached(report["reason"])
    except NotCached as exc:
        if options["cache_activations"] == "on":
            raise UsageError(f"cannot cache activations: {exc}", hint="leave out --cache-activations on") from exc
        return images, dict(stored or {"cut": None, "activations": {**NOTHING_CACHED, "reason": str(exc)}})
    network.backbone = activations.tail
    return activations.source(report["stored_dtype"]), {"cut": activations.layer, "activations": report}


def _find_activations(images: ImageSource, options: Mapping[str, Any], cache: Cache) -> ActivationCache:
    """Return the activations that the unfrozen layers of all phases can be trained from."""
    augment, views = images.augment, options["views"]
    if options["cache_activations"] == "off":
        raise NotCached("--cache-activations off")
    if options["cutmix"]:
        raise NotCached("--cutmix changes images in every epoch")
    if augment != "none" and not views:
        raise NotCached(f"--augment {augment} changes images in every epoch; --views 4 would cache four views of each")
    patterns = [pattern for phase in phases_of(options) for pattern in phase["unfreeze"]]
    unfrozen = unfreeze_parameters(images.backbone, patterns)
    try:
        return ActivationCache(*cut_backbone(images.backbone, unfrozen), images, cache, views)
    except UsageError as exc:
        raise NotCached(exc.message) from exc


def _cache(
    network: Network,
    activations: ActivationCache,
    options: Mapping[str, Any],
    max_bytes: float,
    dtype: str | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Fill the spaces if that pays off, and return the `activations` of the report.

    Train is stored in float16 where that changes no prediction and hardly any logit.
    """
    drift, is_small = _float16_error(network, activations)
    dtype = dtype or ("float16" if is_small and activations.layer != "head" else "float32")
    try:
        missing = _check_space(activations, dtype, max_bytes)
        is_forced = options["cache_activations"] == "on"
        reason = "--cache-activations on" if is_forced else _check_time(activations, dtype, missing, options)
    except NotCached as exc:
        return {**NOTHING_CACHED, "reason": str(exc)}
    stored = {"stored_dtype": dtype, "packed": False, "float16_max_abs_diff": drift}  # earlier versions packed rows
    counts = activations.fill(dtype, progress)
    return {"cached": True, **counts, "views": options["views"], **stored, "reason": reason}


def _float16_error(network: Network, activations: ActivationCache) -> tuple[float, bool]:
    """Return the largest change of a logit by float16 activations, and whether float16 is accurate enough."""
    pairs = []
    with torch.inference_mode():
        for images, _ in activations.images.probe:
            exact = activations.trunk.module(images).reshape(-1, *activations.shape)
            pairs.append([network.head(activations.tail(one)) for one in (exact, exact.half().float())])
    logits, rounded = (torch.cat(part) for part in zip(*pairs, strict=True))
    error = float((rounded - logits).abs().nan_to_num(torch.inf).max())
    is_same = torch.equal(rounded.argmax(1), logits.argmax(1))
    return error, is_same and error <= FLOAT16_TOLERANCE * float(logits.abs().max())


def _check_space(activations: ActivationCache, dtype: str, max_bytes: float) -> int:
    """Return the number of missing rows, if the disk and --max-cache-size have space for them."""
    manifest, folder = activations.images.features.manifest, activations.cache.spaces_folder
    missing = needed = total = 0
    for target in activations.targets(dtype):
        found, size = look_up(target.space, manifest, splits=target.splits), row_bytes(target)
        missing += len(found.missing)
        needed += 2 * len(found.missing) * size  # in shards, and in the merged file
        total += len(found.wanted) * size
    if total > max_bytes:
        raise NotCached(f"they take {format_size(total)}, --max-cache-size is {format_size(int(max_bytes))}")
    make_folder(folder)
    free = max(0, shutil.disk_usage(folder).free - RESERVED_BYTES)
    if needed > free:
        raise NotCached(f"writing them takes {format_size(needed)}, {format_size(free)} are available in {folder}")
    return missing


def _check_time(activations: ActivationCache, dtype: str, missing: int, options: Mapping[str, Any]) -> str:
    """Return the estimated times as text, if training on activations takes less time."""
    images, epochs = activations.images, sum(phase["epochs"] for phase in phases_of(options))
    trunk_s = _time_trunk(activations)
    read_s = row_bytes(activations.targets(dtype)[0]) / _measure_read_rate(activations.cache.spaces_folder)
    rows = epochs * len(images.samples("train")) + (epochs + 1) * len(images.samples("val"))
    cached_s, images_s = missing * trunk_s + rows * read_s, rows * trunk_s
    reason = (
        f"the trunk takes {_two_digits(1000 * trunk_s)} ms per image and reading a row {_two_digits(1000 * read_s)} ms: "
        f"{_two_digits(cached_s)} s with activations, {_two_digits(images_s)} s without"
    )
    if cached_s >= images_s:
        raise NotCached(reason)
    return reason


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):.15g}"


def _time_trunk(activations: ActivationCache) -> float:
    """Return the seconds per image that the trunk takes for the first batch of the probe, the faster of two passes."""
    images, _ = activations.images.probe[0]
    trunk = activations.trunk.module
    with torch.inference_mode():
        return min(timeit.repeat(lambda: float(trunk(images).sum()), number=1, repeat=2)) / len(images)


def _measure_read_rate(folder: Path) -> float:
    """Return the bytes per second at which the disk reads a file that is not in the page cache."""
    with storage_errors(folder, "write"), NamedTemporaryFile(dir=folder, prefix=TEMPORARY) as stream:
        stream.write(os.urandom(READ_TEST_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return READ_TEST_BYTES / timeit.timeit(Path(stream.name).read_bytes, number=1)

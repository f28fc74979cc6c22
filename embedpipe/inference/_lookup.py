"""Lookup of the rows of a data set in a space: which are stored and which are missing, without loading a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Space, SpaceView
from embedpipe.data import ByteSource, Failure, Manifest, Sample
from embedpipe.inference._drift import is_new

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

KEY_BYTES = 32


@dataclass(frozen=True)
class FeatureRequest:
    """The features of one backbone, at one layer and in one view, and the space that stores them.

    loader : dict             keyword arguments of `load_backbone`, stored with the rows so that a head can load it again
    splits : tuple or None    splits whose samples are requested; None: all
    """

    space: Space
    backbone: Backbone
    loader: Mapping[str, Any] = field(default_factory=dict)
    splits: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ExtractionResult:
    """The result of an extraction: the numbers of rows computed and reused, and the failures of this data set.

    bottleneck : str     the busiest stage: "decode", "forward" or "commit"; "none" if nothing was computed
    executor : str       the executor that was used; "none" if nothing was computed
    difference : float   of its features from those of eager torch, where that was measured
    """

    computed: int
    reused: int
    failed: tuple[Failure, ...]
    bottleneck: str = "none"
    executor: str = "none"
    difference: float = 0.0


@dataclass(frozen=True)
class Lookup:
    """The requested samples by key, a view of the stored rows, and the samples without a row."""

    wanted: dict[bytes, Sample]
    view: SpaceView
    missing: dict[bytes, Sample]


def space_spec(backbone: Backbone, precision: str, store_dtype: str, *, view: int = 0) -> dict[str, Any]:
    """Return everything that shapes a row; the fingerprint of a space is its hash."""
    return {**backbone.spec, "precision": precision, "stored_dtype": store_dtype, "view": view}


def look_up(space: Space, manifest: Manifest, *, splits: tuple[str, ...] | None, retry_failed: bool = False) -> Lookup:
    """Return which samples of a manifest, or of some of its splits, a space holds and lacks.

    A recorded failure does not count as missing unless `retry_failed`.
    """
    wanted: dict[bytes, Sample] = {}
    for sample in manifest.samples:
        if splits is None or sample.split in splits:
            wanted.setdefault(sample.key, sample)
    view = space.view()
    failures = {} if retry_failed else view.failures
    return Lookup(wanted, view, {k: s for k, s in wanted.items() if k not in view and k not in failures})


def reuse_space(
    space: Space, manifest: Manifest, record: Mapping[str, Any], *, splits: tuple[str, ...] | None, retry_failed: bool
) -> ExtractionResult | None:
    """Return the result of an extraction that has nothing to compute and nothing to check, else None.

    Parameters
    ----------
    record : dict    this environment, as `record_environment` returns it
    """
    found = look_up(space, manifest, splits=splits, retry_failed=retry_failed)
    if found.missing or space.interrupted or is_new(space, record, computing=False):
        return None
    return summarise(manifest, found, found.view, {})


def summarise(
    manifest: Manifest, found: Lookup, after: SpaceView, transient: Mapping[bytes, tuple[str, str]], *ran: Any
) -> ExtractionResult:
    """Return the result of an extraction from the lookup before it and the view after it.

    Parameters
    ----------
    transient : dict    failures that are not stored: key -> (stage, reason)
    ran                 bottleneck, executor and difference
    """
    reasons = {key: (stage, reason) for key, (stage, reason, _) in after.failures.items()} | dict(transient)
    failing = [sample for sample in manifest.samples if sample.key in reasons]
    failed = tuple(Failure(manifest.display_name(sample), *reasons[sample.key]) for sample in failing)
    computed = sum(key not in reasons for key in found.missing)
    reused = sum(key not in reasons for key in found.wanted) - computed
    return ExtractionResult(computed, reused, (*manifest.unreadable, *failed), *(ran if found.missing else ()))


def missing_images(manifest: Manifest, lookups: Iterable[Lookup]) -> dict[bytes, ByteSource]:
    """Return the images that at least one space lacks."""
    return {key: manifest.byte_source_of(sample) for found in lookups for key, sample in found.missing.items()}


def row_bytes(request: FeatureRequest) -> int:
    """Return the size of a row on the disk in bytes, its key included."""
    itemsize: int = np.dtype(request.space.spec["stored_dtype"]).itemsize
    return request.backbone.feature_dim * itemsize + KEY_BYTES

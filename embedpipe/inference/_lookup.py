"""What a space holds and lacks of a data set, told without a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Space, SpaceView
from embedpipe.data import Failure, Manifest, Place, Sample
from embedpipe.inference._drift import is_new

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

KEY_BYTES = 32


@dataclass(frozen=True)
class Target:
    """A space to fill, and the backbone that does.

    loader : dict             how the backbone was named; recorded beside the rows so that a head can load it again
    splits : tuple or None    splits whose samples are wanted; None: all
    """

    space: Space
    backbone: Backbone
    loader: Mapping[str, Any] = field(default_factory=dict)
    splits: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Filled:
    """What filling a space took: rows computed, rows found there, failures of this data set, and how it went.

    bottleneck : str     the stage that set the pace: "decode", "forward" or "commit"; "none" where nothing was computed
    executor : str       what carried the images through the backbone; "none" where nothing was computed
    difference : float   of its features from eager torch, where that was measured
    """

    computed: int
    reused: int
    failed: tuple[Failure, ...]
    bottleneck: str = "none"
    executor: str = "none"
    difference: float = 0.0


@dataclass(frozen=True)
class Lookup:
    """What a space says of a manifest: its samples by key, a view of the rows, and the samples still to compute."""

    wanted: dict[bytes, Sample]
    view: SpaceView
    missing: dict[bytes, Sample]

    @property
    def present(self) -> dict[bytes, Sample]:
        return {key: sample for key, sample in self.wanted.items() if key in self.view}


def space_spec(backbone: Backbone, precision: str, store_dtype: str, *, view: int = 0) -> dict[str, Any]:
    """Return all that shapes a row: what the fingerprint of a space is taken from."""
    return {**backbone.spec, "precision": precision, "stored_dtype": store_dtype, "view": view}


def space_name(spec: Mapping[str, Any]) -> str:
    """Return the readable prefix of a space's folder, such as `timm-resnet18`."""
    return re.sub(r"[^\w.+-]+", "-", f"{spec['source']}-{spec['architecture']}")


def look_up(
    space: Space, manifest: Manifest, *, splits: tuple[str, ...] | None = None, retry_failed: bool = False
) -> Lookup:
    """Return what a space holds and lacks of a manifest, or of some of its splits.

    Recorded failures are not lacking unless they are tried again.
    """
    wanted: dict[bytes, Sample] = {}
    for sample in manifest.samples:
        if splits is None or sample.split in splits:
            wanted.setdefault(sample.key, sample)
    view = space.view()
    failures = {} if retry_failed else view.failures
    return Lookup(wanted, view, {k: s for k, s in wanted.items() if k not in view and k not in failures})


def reuse_space(
    space: Space,
    manifest: Manifest,
    record: Mapping[str, Any],
    *,
    splits: tuple[str, ...] | None = None,
    retry_failed: bool = False,
) -> Filled | None:
    """Return what filling would where there is nothing to compute and nothing to prove, else None; no model is needed.

    Parameters
    ----------
    record : dict    of this environment, as `record_environment` returns it
    """
    found = look_up(space, manifest, splits=splits, retry_failed=retry_failed)
    if found.missing or space.interrupted or is_new(space, record, computing=False):
        return None
    return summarise(manifest, found, found.view, {})


def summarise(
    manifest: Manifest, found: Lookup, after: SpaceView, passing: Mapping[bytes, tuple[str, str]], *ran: Any
) -> Filled:
    reasons = {key: (stage, reason) for key, (stage, reason, _) in after.failures.items()} | dict(passing)
    failed = tuple(
        Failure(manifest.name_of(sample), *reasons[sample.key]) for sample in manifest.samples if sample.key in reasons
    )
    computed = sum(key not in reasons for key in found.missing)
    reused = sum(key not in reasons for key in found.wanted) - computed
    return Filled(computed, reused, (*manifest.unreadable, *failed), *(ran if found.missing else ()))


def ahead_of(manifest: Manifest, founds: Iterable[Lookup]) -> dict[bytes, Place]:
    """Return the images that any of the spaces lacks."""
    return {key: manifest.place_of(sample) for found in founds for key, sample in found.missing.items()}


def row_bytes(target: Target) -> int:
    """Return what a row takes on the disk, its key included."""
    itemsize: int = np.dtype(target.space.spec["stored_dtype"]).itemsize
    return target.backbone.feature_dim * itemsize + KEY_BYTES

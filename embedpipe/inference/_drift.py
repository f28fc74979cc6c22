"""Environment drift: does this environment compute the rows that another environment stored?

Library versions, device and pins are recorded with the rows; they are not part of the fingerprint of a space. In an
environment that is new to a space, a few stored rows are computed again and compared. If they differ, CacheMismatch is raised.

>>> check_drift(space, view, items, Runner([backbone], settings))
8
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.data import ByteSource
from embedpipe.errors import CacheMismatch
from embedpipe.inference._runner import Runner, stream_rows
from embedpipe.inference._settings import PINS, InferenceSettings
from embedpipe.provenance import environment

if TYPE_CHECKING:
    from embedpipe.cache import Space, SpaceView

PROBES = 8
# Largest distance from the stored row relative to its norm. The same pins on one machine give the same bits; another
# batch size or memory format changes a row by 1e-6 in fp32 and 3e-3 in bf16; one grey level in all pixels by 1e-3.
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 1.5e-2}
SHAPING = ("torch", "torchvision", "timm", "numpy", "pillow", "machine", "device")


def record_environment(settings: InferenceSettings, loader: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded with rows that are computed now."""
    return {**environment(settings.device), "pins": settings.pins, "loader": dict(loader)}


def is_new(space: Space, record: Mapping[str, Any], *, computing: bool) -> bool:
    """Return True if the rows of a space have not been verified in an environment like this one.

    The environment that created the space counts as verified, a later one if rows were checked in it. Pins matter only if
    rows are to be computed.
    """
    fields = (*SHAPING, *PINS) if computing else SHAPING
    trusted = [one for n, one in enumerate(space.environments) if n == 0 or one.get("probed")]
    return bool(trusted) and _shaping(record, fields) not in [_shaping(one, fields) for one in trusted]


def check_drift(space: Space, view: SpaceView, items: Iterable[tuple[bytes, ByteSource]], runner: Runner) -> int:
    """Compute up to 8 stored rows again, compare them with what is stored, and return their number.

    Parameters
    ----------
    items : (key, place) of images with a row in `view`
    runner : Runner    of the backbone that computed it

    Raises
    ------
    CacheMismatch    the distance of a row from the stored one exceeds the tolerance of its precision
    """
    fields = (*SHAPING, *PINS)
    settings = runner.settings
    stored_in, here = _shaping(space.environments[-1], fields), _shaping(record_environment(settings, {}), fields)
    chosen = sorted(items)[: 2 * PROBES]  # sorted by key, which is random; spares for files that have changed
    worst, probed = 0.0, 0
    for rows in stream_rows(chosen, runner):
        keys = rows.keys[: PROBES - probed]
        worst = max([worst, *row_distances(view.read(keys), rows.features[: len(keys)]).tolist()])
        if any(stage in ("decode", "forward") for _, stage, _ in rows.failures):
            worst = np.inf
        probed += len(keys)
        if probed >= PROBES:
            break
    tolerance = TOLERANCE[settings.precision]
    if worst > tolerance:
        changes = [f"{name} {stored_in[name]} -> {here[name]}" for name in fields if here[name] != stored_in[name]]
        raise CacheMismatch(
            f"rows in {space.folder.name} come out {worst:.2g} away from what is stored, expected at most {tolerance:g}; "
            f"since they were computed: {', '.join(changes) or 'nothing that is recorded has changed'}",
            hint=f"return to that environment, use another --cache-dir, or `embedpipe cache rm {space.folder.name}`",
        )
    return probed


def row_distances(stored: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return the distances of rows (N, D) from the stored ones, relative to the norms of these, float64 (N,)."""
    old, new = stored.astype(np.float64), fresh.astype(np.float64)
    lengths = np.maximum(np.linalg.norm(old, axis=1), np.finfo(np.float32).tiny)
    return np.asarray(np.linalg.norm(old - new, axis=1) / lengths)


def _shaping(record: Mapping[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a record that can change a feature."""
    known = {**record, **record.get("pins", {})}
    return {name: known.get(name) for name in fields}

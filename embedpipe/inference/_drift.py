"""Environment drift: do rows that another environment stored still come out the same here?

Library versions, device and pins are recorded beside the rows, not hashed. Where this environment has not written into a
space before, a few stored rows are computed again and compared; a space that fails the test is refused.

>>> check_drift(space, view, items, Runner([backbone], forward))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.data import Place
from embedpipe.errors import CacheMismatch
from embedpipe.inference._runner import Runner
from embedpipe.inference._settings import Forward
from embedpipe.inference._stream import stream_rows
from embedpipe.provenance import environment

if TYPE_CHECKING:
    from embedpipe.cache import Space, SpaceView

PROBES = 8
# Largest distance of a row from the stored one, as a share of its length. The same pins on one machine give the same bits;
# in fp32 another batch size or memory format moves a row by 1e-6, in bf16 by 3e-3; one grey level in all pixels by 1e-3.
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 1.5e-2}
SHAPING = ("torch", "torchvision", "timm", "numpy", "pillow", "machine", "device")
PINS = ("executor", "batch_size", "threads", "channels_last")


def record_environment(forward: Forward, loader: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded beside the rows that are computed now."""
    return {**environment(forward.device), "pins": forward.pins, "loader": dict(loader)}


def is_new(space: Space, record: Mapping[str, Any], *, computing: bool) -> bool:
    """Tell whether the rows of a space have not been proved in an environment like this one.

    The first environment made the space; a later one counts once rows have been probed in it. Where rows are only
    read (not `computing`), pins do not matter.
    """
    fields = (*SHAPING, *PINS) if computing else SHAPING
    trusted = [one for n, one in enumerate(space.environments) if n == 0 or one.get("probed")]
    return bool(trusted) and _shaping(record, fields) not in [_shaping(one, fields) for one in trusted]


def check_drift(space: Space, view: SpaceView, items: Iterable[tuple[bytes, Place]], runner: Runner) -> int:
    """Compute up to 8 stored rows again, compare, and return how many; none where none of these images has a row.

    Parameters
    ----------
    items : (key, place) of images with a row in `view`
    runner : Runner    of the backbone that made it

    Raises
    ------
    CacheMismatch    a row is farther from the stored one than the tolerance of its precision
    """
    fields = (*SHAPING, *PINS)
    forward = runner.settings
    stored_in, here = _shaping(space.environments[-1], fields), _shaping(record_environment(forward, {}), fields)
    chosen = sorted(items)[: 2 * PROBES]  # by key, which is as good as random; spares for files that have changed
    worst, probed = 0.0, 0
    for rows in stream_rows(chosen, runner):
        keys = rows.keys[: PROBES - probed]
        worst = max([worst, *row_distances(view.read(keys), rows.features[: len(keys)]).tolist()])
        if any(stage in ("decode", "forward") for _, stage, _ in rows.failures):
            worst = np.inf
        probed += len(keys)
        if probed >= PROBES:
            break
    tolerance = TOLERANCE[forward.precision]
    if worst > tolerance:
        changes = [
            f"{name} {stored_in.get(name)} -> {here[name]}" for name in here if here[name] != stored_in.get(name)
        ]
        raise CacheMismatch(
            f"rows in {space.folder.name} come out {worst:.2g} away from what is stored, expected at most {tolerance:g}; "
            f"since they were computed: {', '.join(changes) or 'nothing that is recorded has changed'}",
            hint=f"go back to that environment, name another --cache-dir, or `embedpipe cache rm {space.folder.name}`",
            difference=worst,
            tolerance=tolerance,
            stored_environment=stored_in,
            environment=here,
        )
    return probed


def row_distances(stored: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return how far rows (N, D) are from the stored ones, float64 (N,), as a share of the length of these."""
    old, new = stored.astype(np.float64), fresh.astype(np.float64)
    lengths = np.maximum(np.linalg.norm(old, axis=1), np.finfo(np.float32).tiny)
    return np.asarray(np.linalg.norm(old - new, axis=1) / lengths)


def _shaping(record: Mapping[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the part of a record that can move a feature."""
    known = {**record, **record.get("pins", {})}
    return {name: known.get(name) for name in fields}

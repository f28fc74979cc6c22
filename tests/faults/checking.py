"""Checks of a folder after faults, against what the process reported as safe; each raises at the first error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embedpipe.cache import Cache
from embedpipe.runs import read_run

from .publishing import BROKEN, KEY_BYTES, KEYS, MANIFEST, PINS, ROWS, X, publish_all, space_of

Said = Iterable[dict[str, Any]]


def problem_of(check: Callable[..., None], *arguments: Any) -> str | None:
    """Return what a check complains about."""
    try:
        check(*arguments)
    except Exception as exc:  # noqa: BLE001  whatever the reader raises is the finding
        return f"{type(exc).__name__}: {exc}"
    return None


def check_published(root: Path, said: Said) -> None:
    """Check that everything reported as safe is there, and that no row is wrong."""
    space, cache = space_of(root), Cache(root / "cache")
    view = space.view()
    for i, key in enumerate(KEYS):
        assert key not in view or (view.read([key])[0] == X[i]).all(), f"row {i} is wrong"
    assert len(view) == sum(key in view for key in KEYS), "rows that nobody wrote"
    pins = "may change"
    for message in said:
        match message:
            case {"rows": rows}:
                assert not (lost := [i for i in rows if KEYS[i] not in view]), f"rows {lost} are lost"
                assert not rows or space in cache.spaces(), "the space is not listed"
            case {"failed": _}:
                assert BROKEN in view.failures, "the failure is lost"
            case {"pins": state}:
                pins = state
            case {"table": name}:
                assert cache.read_dataset(name) == MANIFEST, "the sample table is lost"
            case {"latest": name}:
                assert (cache.latest() or {})["dataset"] == name, "latest.json is lost"
            case {"run": name}:
                assert read_run(root / "runs" / name)["verb"] == "fit-head"
                assert (root / "runs" / name / "model" / "weights").read_text() == "w" * 5000, (
                    "a file of the run is lost"
                )
    found = space.meta.pins if space.meta else None
    expected = {"may change": found, "in force": PINS, "ended": None}[pins]
    assert found == expected, f"the pins are not {pins}"


def check_resumed(root: Path, whole: bytes) -> None:
    """Check that the same command again computes exactly what is missing and ends with the same file."""
    space = space_of(root)
    view = space.view()
    missing = sum(key not in view for key in KEYS)
    said: list[dict[str, Any]] = []
    computed = publish_all(root, said.append)
    assert computed == missing, f"{computed} rows computed, {missing} were missing"
    check_published(root, said)
    assert space.features_path.read_bytes() == whole, "features.h5 differs from that of an unbroken run"
    assert (space.pending_shards, space.interrupted) == (0, False), "the resumed run is not finished"
    check_no_trace(space.folder)


def check_no_trace(folder: Path) -> None:
    """No attempt that failed has left a file."""
    left = [path.name for path in folder.rglob(".tmp-*")]
    assert not left, f"left behind: {left}"


def check_plain(root: Path, said: Said) -> None:
    """Check that the rows reported as safe are in the plain HDF5 file."""
    rows = [row for message in said for row in message.get("rows", ())]
    if not rows:
        return
    with h5py.File(root / "plain.h5") as file:
        features, keys = file["features"], file["keys"]
        stored, expected = keys[:], KEY_BYTES[np.arange(len(keys)) % ROWS]
        assert len(keys) > max(rows), f"{len(keys)} rows, {max(rows) + 1} were safe"
        assert (stored[rows] == expected[rows]).all(), "a key is wrong"
        assert (features[: max(rows) + 1] == X[np.array(rows) % ROWS]).all(), "a row is wrong"

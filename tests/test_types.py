"""Few types lie between the command `extract` and a committed row, and between arrays and a saved head."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import embedpipe as ep
from embedpipe.selection import HeadConfig

PATH = ("embedpipe.commands.extract", "embedpipe.inference")  # packages that an image passes on its way to a row
NOT_CARRIERS = {
    "Torch": "the executor that wraps a torch module: images in, features out",
    "ExtractionResult": "the result, made after the rows are committed",
    "Uses": "a torch function mode that lives while batch normalisations are folded",
}
MOST_TYPES, MOST_HEAD_TYPES, MOST_DICTS, MOST_HEAD_DICTS = 6, 7, 2, 1
MOST_IN_ALL = 24  # with the classes of other packages that code of the path has in hand


def own_class(frame: FrameType) -> type | None:
    """Return the class whose method a frame runs, if it belongs to the path; a dataclass shows by its __init__."""
    owner = type(frame.f_locals.get("self"))
    return owner if str(owner.__module__).startswith(PATH) else None


def dicts_of_options(frame: FrameType) -> set[tuple[str, ...]]:
    """Return the keys of dicts with more than three entries that a function of the path takes as **options."""
    code = frame.f_code
    if not code.co_flags & 0x08:  # CO_VARKEYWORDS
        return set()
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)]
    options = frame.f_locals.get(name)
    return {tuple(sorted(options))} if isinstance(options, Mapping) and len(options) > 3 else set()


def classes_in(frame: FrameType) -> set[str]:
    """Return the names of our classes among the variables of a frame, and in the beginnings of its lists and dicts."""
    parts = [
        part
        for value in frame.f_locals.values()
        for part in (list(value)[:3] if isinstance(value, list | tuple) else [value])
    ]
    parts += [one for value in parts if isinstance(value, dict) for one in list(value.values())[:1]]
    return {type(part).__name__ for part in parts if type(part).__module__.startswith("embedpipe.")}


def test_extract_passes_few_types(photos: Path, tmp_path: Path) -> None:
    """Collect the classes of the path that a method is called of, all classes that it has in hand, and its option dicts."""
    types: set[type] = set()
    in_hand: set[str] = set()
    options: set[tuple[str, ...]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "return") and str(frame.f_globals.get("__name__")).startswith(PATH):
            in_hand.update(classes_in(frame))
            options.update(dicts_of_options(frame))
            if owner := own_class(frame):
                types.add(owner)

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        features = ep.extract(
            photos, "timm:test_resnet", weights="none", executor="eager", cache_dir=tmp_path / "cache"
        )
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert features.summary["computed"] == 36
    carriers = {one.__name__ for one in types} - NOT_CARRIERS.keys()
    print(
        f"types of the path: {sorted(carriers)}; in hand: {len(in_hand)} {sorted(in_hand)}; options: {sorted(options)}"
    )
    assert carriers >= {"Runner", "Rows"}
    assert in_hand >= {"Manifest", "Sample", "ByteSource", "Batch", "SpaceWriter"}
    assert len(carriers) <= MOST_TYPES
    assert len(in_hand) <= MOST_IN_ALL
    assert len(options) <= MOST_DICTS


def test_a_head_passes_few_types(tmp_path: Path) -> None:
    """Collect the classes of embedpipe that appear in any frame between arrays and the saved head."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    X = (rng.normal(size=(3, 16))[y] + rng.normal(size=(300, 16))).astype(np.float32)
    types: set[str] = set()
    options: set[tuple[str, ...]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("embedpipe."):
            types.update(classes_in(frame))
            options.update(dicts_of_options(frame))

    sys.setprofile(trace)
    try:
        path = HeadConfig(("a", "b", "c")).select(X[:200], y[:200], X[200:], y[200:])
        path.head.save(tmp_path)
    finally:
        sys.setprofile(None)
    print(f"types: {sorted(types)}; options: {sorted(options)}")
    assert types >= {"HeadConfig", "LinearHead"}
    assert len(types) <= MOST_HEAD_TYPES
    assert len(options) <= MOST_HEAD_DICTS

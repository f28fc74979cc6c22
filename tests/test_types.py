"""Few types lie between the command `extract` and a committed row."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import embedpipe as ep

PATH = ("embedpipe.commands.extract", "embedpipe.inference")  # packages that an image passes on its way to a row
BORDER = {"Manifest", "Sample", "Place", "Batch", "SpaceWriter"}  # of other packages: what is read, decoded and written
NOT_CARRIERS = {
    "Torch": "the executor that wraps a torch module: images in, features out",
    "Filled": "the result, made after the rows are committed",
    "Uses": "a torch function mode that lives while batch normalisations are folded",
}
MOST_TYPES = 6


def own_class(frame: FrameType) -> type | None:
    """Return the class of embedpipe whose method a frame runs."""
    owner = frame.f_locals.get("self")
    return type(owner) if type(owner).__module__.startswith("embedpipe.") else None


def dicts_of_options(frame: FrameType) -> set[tuple[str, ...]]:
    """Return the keys of dicts with more than three entries that a function of the path takes as **options."""
    code = frame.f_code
    if not code.co_flags & 0x08:  # CO_VARKEYWORDS
        return set()
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)]
    options = frame.f_locals.get(name)
    return {tuple(sorted(options))} if isinstance(options, Mapping) and len(options) > 3 else set()


def test_extract_passes_few_types(photos: Path, tmp_path: Path) -> None:
    """Every class of the path that has a method called or an instance alive, and every dict of more than three options."""
    types: set[type] = set()
    options: set[tuple[str, ...]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        module = frame.f_globals.get("__name__", "")
        if owner := own_class(frame):
            types.add(owner)
        if module.startswith(PATH):
            options.update(dicts_of_options(frame))

    import threading

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
    types |= {type(one) for one in gc.get_objects() if type(one).__module__.startswith(PATH)}
    carriers = {one.__name__ for one in types if one.__module__.startswith(PATH)} - NOT_CARRIERS.keys()
    print(f"types: {sorted(carriers)}; of other packages: {sorted(BORDER)}; options: {sorted(options)}")
    assert len(carriers) + len(options) <= MOST_TYPES
    assert carriers >= {"Runner", "Rows"}

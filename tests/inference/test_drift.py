"""Rows stored under another environment are probed before they are reused, and refused where they come out differently."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpipe.cache import Cache, Space
from embedpipe.cache._meta import Meta, read_meta, write_meta
from tests.conftest import TINY, Run

ENVIRONMENT = ("torch", "torchvision", "timm", "numpy", "pillow", "machine", "device")


def only_space() -> Space:
    [space] = Cache(Path("cache")).spaces()
    return space


def rewrite(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the environments in meta.json."""
    folder = only_space().folder
    meta = read_meta(folder)
    assert isinstance(meta, Meta)
    write_meta(folder, replace(meta, environments=tuple(change(dict(one)) for one in meta.environments)))


def made_elsewhere(field: str) -> None:
    """Let the space say that another environment made its rows."""
    rewrite(lambda record: {**record, field: "0.0"})


def spoil(keys: Sequence[bytes], factor: float) -> None:
    """Give rows other values: the space is written anew with the same spec and environment."""
    space = only_space()
    view, meta = space.view(), space.meta
    assert meta is not None
    features = view.read(keys) * np.float32(factor)
    shutil.rmtree(space.folder)
    options = {"feature_dim": features.shape[1], "dtype": "float32", "environment": meta.environments[0], "pins": {}}
    with space.writer(**options) as writer:
        writer.append(keys, features)
        writer.finish()


def all_keys() -> list[bytes]:
    return [key.tobytes() for key in only_space().view().keys]


@pytest.mark.parametrize("field", ENVIRONMENT)
def test_the_same_rows_are_reused_and_probed_once(run: Run, photos: Path, field: str) -> None:
    run("extract", photos, *TINY)
    made_elsewhere(field)
    again = run("extract", photos, *TINY, "--json").data
    assert (again["computed"], again["reused"]) == (0, 36)
    environments = only_space().environments
    assert [one.get("probed") for one in environments] == [None, 8]
    run("extract", photos, *TINY)
    assert only_space().environments == environments


@pytest.mark.parametrize(("factor", "code"), [(1 + 1e-4, 0), (1.01, 4)])
def test_rows_that_come_out_differently_are_refused(run: Run, photos: Path, factor: float, code: int) -> None:
    run("extract", photos, *TINY)
    spoil(all_keys(), factor)
    assert run("extract", photos, *TINY).code == 0  # its own environment: nothing to doubt
    made_elsewhere("pillow")
    done = run("extract", photos, *TINY)
    assert done.code == code
    if code:
        assert "come out 0.0099 away from what is stored, expected at most 0.001" in done.line
        assert "pillow 0.0 -> " in done.line
        before = only_space().meta
        assert run("extract", photos, *TINY).code == code
        assert only_space().meta == before


def test_a_device_or_library_that_no_field_names_does_not_matter(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    made_elsewhere("h5py")
    before = only_space().environments
    assert run("extract", photos, *TINY, "--json").data["computed"] == 0
    assert only_space().environments == before


def test_other_pins_are_probed_when_there_is_something_to_compute(run: Run, photos: Path) -> None:
    run("extract", photos / "red", *TINY)
    run("extract", photos / "red", *TINY, "--batch-size", 8)
    assert len(only_space().environments) == 1
    more = run("extract", photos, *TINY, "--batch-size", 8, "--json").data
    assert (more["computed"], more["reused"]) == (24, 12)
    assert [one.get("probed") for one in only_space().environments] == [None, 8]


def test_new_images_alone_are_no_probe(run: Run, photos: Path) -> None:
    """Rows that nobody reuses prove nothing: the next one who does reuse them probes."""
    run("extract", photos / "red", *TINY)
    made_elsewhere("torch")
    run("extract", photos / "blue", *TINY)
    assert [one.get("probed") for one in only_space().environments] == [None, 0]
    run("extract", photos / "red", *TINY)
    assert [one.get("probed") for one in only_space().environments] == [None, 0, 8]


def test_files_that_have_changed_are_no_probe(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    made_elsewhere("torch")
    kept = sorted(all_keys())
    for path in sorted(photos.rglob("*.png"))[:34]:
        path.unlink()
    assert run("extract", photos, *TINY).code == 0
    assert [one.get("probed") for one in only_space().environments] == [None, 2]
    assert sorted(all_keys()) == kept

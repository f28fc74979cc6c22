"""Flipped bits and truncation are detected anywhere, and damaged rows are never returned."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedpipe.cache import Cache, Space
from embedpipe.cache._datasets import read_table
from embedpipe.data import Manifest, Sample, Source
from embedpipe.errors import CacheMismatch

from .conftest import rows, write

KEYS, X = rows(300, 1024)


def read_all(space: Space) -> None:
    view = space.view()
    assert (view.read([key for key in KEYS if key in view]) == X[: len(view)]).all()
    assert view.failures == {}


@pytest.fixture
def targets(cache: Cache, space: Space) -> list[tuple[Path, Callable[[], object]]]:
    write(space, KEYS[:290], X[:290])
    with space.writer(feature_dim=1024, dtype="float32", environment={}, pins={}) as writer:
        writer.append(KEYS[290:], X[290:])
    sample = Sample("a/1.png", "a", "train", None, KEYS[0], 0)
    manifest = Manifest("data", (Source("data", Path("/data")),), (sample,), ("a",), 0, (), ())
    table = cache.root / "datasets" / f"{cache.write_dataset(manifest)}.h5"

    def check() -> None:
        read_all(space)

    return [
        (space.features_path, check),
        (space.shard_paths()[0], check),
        (space.folder / "meta.json", check),
        (table, lambda: read_table(table)),
    ]


def damages(raw: bytes, chance: random.Random) -> list[bytes]:
    """Flip bits, half of them in what is not features; cut at random places; add a tail."""
    results = [raw + b"\0", b"", raw[:511]]
    for limit in [len(raw)] * 12 + [min(len(raw), 8000)] * 12 + [min(len(raw), 512)] * 6:
        place = chance.randrange(limit)
        flipped = bytearray(raw)
        flipped[place] ^= 1 << chance.randrange(8)
        results.append(bytes(flipped))
    results += [raw[: chance.randrange(len(raw))] for _ in range(6)]
    return [damage for damage in results if damage != raw]


def test_every_damage_is_found(targets: list[tuple[Path, Callable[[], object]]]) -> None:
    chance = random.Random(0)
    for path, read in targets:
        raw = path.read_bytes()
        read()
        for damage in damages(raw, chance):
            path.write_bytes(damage)
            with pytest.raises(CacheMismatch):
                read()
        path.write_bytes(raw)
        read()


def test_intact_blocks_of_a_damaged_file_are_still_read(space: Space) -> None:
    write(space, KEYS, X)
    raw = bytearray(space.features_path.read_bytes())
    raw[-1] ^= 1
    space.features_path.write_bytes(raw)
    view, order = space.view(), np.argsort(KEYS)
    assert (view.read([KEYS[order[0]]]) == X[order[0]]).all()
    with pytest.raises(CacheMismatch, match="MiB 1 of its features"):
        view.read([KEYS[order[-1]]])

"""Spaces with packed rows, which older versions wrote: they are listed and removed, never read and never called damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from embedpipe.cache import Cache, Space, measure, verify_space
from embedpipe.errors import CacheMismatch

from .conftest import rows, write

DATA = Path(__file__).parent / "data"  # 8 rows in the base and 4 in a shard, as written before packing was removed
NAME = "timm-test_resnet-layer4-1b927e8eb040"


@pytest.fixture
def packed(cache: Cache) -> Space:
    shutil.copytree(DATA / NAME, cache.spaces_folder / NAME)
    return cache.find_space(NAME)


def test_a_packed_space_is_listed_but_never_read(cache: Cache, packed: Space) -> None:
    assert (cache.space_names(), cache.spaces()) == ([NAME], [])
    assert packed.unsupported is not None
    assert (packed.feature_dim, packed.pending_shards, packed.interrupted) == (16, 1, True)
    assert measure(packed.folder) > 10_000
    for use in (packed.view, lambda: write(packed, *rows(1, 16), dtype="float16")):
        with pytest.raises(CacheMismatch, match=rf"no longer supported; remove it with `embedpipe cache rm {NAME}`"):
            use()


def test_a_packed_space_is_unsupported_and_not_damaged(cache: Cache, packed: Space) -> None:
    (finding,) = verify_space(cache, NAME)
    assert (finding.kind, "no longer supported" in finding.detail) == ("unsupported", True)
    meta = packed.folder / "meta.json"
    meta.write_bytes(meta.read_bytes()[:-5])
    assert [finding.kind for finding in verify_space(cache, NAME)] == ["damage"]


def test_the_same_rows_are_computed_again_in_another_space(cache: Cache, packed: Space) -> None:
    spec = {name: value for name, value in packed.spec.items() if name != "packed"}
    space = cache.open_space(spec)
    assert space.fingerprint != packed.fingerprint
    assert len(space.view()) == 0
    keys, X = rows(12, 16)
    write(space, keys, X.astype(np.float16), dtype="float16")
    assert (space.view().read(keys) == X.astype(np.float16)).all()
    assert cache.spaces() == [space]


def test_a_packed_space_is_removed(cache: Cache, packed: Space) -> None:
    cache.remove_space(NAME)
    assert cache.space_names() == []

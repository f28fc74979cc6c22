"""Packed rows: fewer bytes on the disk, the same numbers back, and nothing crafted gets through."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import h5py
import numpy as np
import pytest

from embedpipe.cache import Cache, Space, prove_space, try_packing
from embedpipe.cache._features import key_matrix, write_features
from embedpipe.cache._packing import pack, unpack
from embedpipe.errors import CacheMismatch

from .conftest import PACKED, rows, write

DIM = 1024
KEYS, X = rows(300, DIM)


@pytest.fixture
def space(cache: Cache) -> Space:
    return cache.open_space(PACKED, name="timm-resnet18")


def rewrite(space: Space, packed: Sequence[bytes], sizes: Sequence[int]) -> None:
    """Put a base in place that is well-formed and sealed, whatever its rows hold."""
    with space.features_path.open("wb") as stream:
        write_features(
            stream,
            space.spec,
            key_matrix(KEYS[: len(packed)]),
            [np.frombuffer(row, np.uint8) for row in packed],
            shape=(len(packed), DIM),
            dtype=np.dtype(np.float32),
            failures={},
            packed=np.array(sizes, np.int64),
        )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_zeros_vanish_and_every_bit_comes_back(dtype: str) -> None:
    dense = np.random.default_rng(0).normal(size=(4, 4096)).astype(dtype)
    sparse = np.where(np.random.default_rng(1).random(dense.shape) < 0.5, dense, np.zeros((), dtype))
    for X in (dense, sparse, np.array([[0.0, -0.0, 1e-7, 65504.0]], dtype)):
        assert all(unpack(pack(row), row.dtype, len(row)).tobytes() == row.tobytes() for row in X)
    assert try_packing(sparse).share < 0.75 * try_packing(dense).share < 0.75


def test_a_base_of_zeros_is_small(space: Space) -> None:
    write(space, KEYS, np.zeros_like(X))
    assert space.features_path.stat().st_size < X.nbytes / 10
    assert (space.view().read(KEYS) == 0).all()
    assert space.view().sizes.sum() < X.nbytes / 50


def test_plain_h5py_and_zlib_read_the_documented_schema(space: Space) -> None:
    write(space, KEYS, X)
    with h5py.File(space.features_path) as file:
        ends, raw = file["ends"][:], file["features"][:, 0]
        assert (file.attrs["feature_dim"], file.attrs["dtype"]) == (DIM, b"float32")
        shuffled = [zlib.decompress(part.tobytes()) for part in np.split(raw, ends[:-1])]
    found = [np.frombuffer(one, np.uint8).reshape(4, DIM).T.copy().view(np.float32)[:, 0] for one in shuffled]
    assert (np.stack(found) == X[np.argsort(KEYS)]).all()


def test_a_merge_copies_rows_as_they_are_stored(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    with space.writer(feature_dim=DIM, dtype="float32", environment={}, pins={}, shard_rows=50) as writer:
        writer.append(KEYS, X)
        monkeypatch.setattr("embedpipe.cache._writer.pack", None)
        writer.finish()
    assert (space.pending_shards, len(space.view())) == (0, 300)


def test_values_that_are_not_finite_are_found(cache: Cache, space: Space) -> None:
    write(space, KEYS[:3], X[:3])
    bad = X[:3].copy()
    bad[1, 5] = np.nan
    packed = [pack(row).tobytes() for row in bad]
    rewrite(space, packed, [len(row) for row in packed])
    assert [finding.detail for finding in prove_space(cache, space.folder.name)] == ["row 1 has NaN or infinity"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"no deflate", "incorrect header"),
        (zlib.compress(bytes(10)), "hold 10"),
        (zlib.compress(bytes(1 << 26)), "hold"),
    ],
    ids=["garbage", "short", "bomb"],
)
def test_crafted_rows_are_refused(cache: Cache, space: Space, row: bytes, why: str) -> None:
    write(space, KEYS[:1], X[:1])
    rewrite(space, [row], [len(row)])
    with pytest.raises(CacheMismatch, match=why):
        space.view().read(KEYS[:1])
    [finding] = prove_space(cache, space.folder.name)
    assert why in finding.detail


@pytest.mark.parametrize("sizes", [[50, -20], [0, 30], [7, 7]], ids=str)
def test_rows_that_overlap_or_leave_the_file_are_refused(space: Space, sizes: list[int]) -> None:
    write(space, KEYS[:1], X[:1])
    rewrite(space, [bytes(10), bytes(20)], sizes)
    with pytest.raises(CacheMismatch, match="damaged"):
        space.view()

"""Nearest rows are those of a plain search, and copies are told from neighbours whatever the scale and dimension."""

from __future__ import annotations

import numpy as np
import pytest

from embedpipe.evaluation import copy_ratio, find_neighbours, unit_rows
from embedpipe.evaluation._neighbours import FALSE_ALARMS, K, kth_distance


def rows(n: int, dim: int, seed: int = 0, latent: int | None = None) -> np.ndarray:
    """Unit rows of a curved sheet of `latent` dimensions in `dim`."""
    rng = np.random.default_rng(seed)
    hidden = np.random.default_rng(99).normal(size=(latent or dim, dim))
    return unit_rows(np.tanh(rng.normal(size=(n, latent or dim)) @ hidden / 2).astype(np.float32))


def test_neighbours_are_those_of_a_plain_search() -> None:
    base, queries = rows(20_000, 3), rows(1200, 3, seed=1)  # more than one block
    found = find_neighbours(queries, base)
    for i in (0, 700, 838, 839, 1199):
        chords = np.linalg.norm(base.astype(np.float64) - queries[i], axis=1)
        assert found.nearest[i] == chords.argmin()
        np.testing.assert_allclose([found.first[i], found.kth[i]], np.sort(chords)[[0, 9]], atol=1e-3)
        assert found.similarity[i] == pytest.approx(base[found.nearest[i]] @ queries[i], abs=1e-6)


def test_distances_are_those_of_a_plain_search() -> None:
    X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    plain = np.linalg.norm(X[:, None] - X, axis=2)
    np.testing.assert_allclose(kth_distance(X), np.sort(plain, axis=1)[:, K], atol=1e-3)


def test_a_row_is_not_its_own_neighbour() -> None:
    base = rows(50, 4)
    own = np.array([3, 49])
    found = find_neighbours(base[own], base, own=own)
    assert not (found.nearest == own).any()
    assert (found.first > 0.01).all()


@pytest.mark.parametrize("latent", [2, 6, 12, 60])
def test_distinct_rows_are_no_copies_and_copies_are(latent: int) -> None:
    alarms = 0
    for seed in range(20):
        every = rows(500, 64, seed, latent)
        base, queries = every[:400], every[400:]
        typical = find_neighbours(base, base, own=np.arange(400))
        ratio = copy_ratio(typical, 100)
        alarms += int(find_neighbours(queries, base).copies(ratio).sum())
        noise = np.random.default_rng(seed).normal(size=(20, 64)) / 8
        scale = typical.kth[:20, None] * 0.9 * ratio
        near = unit_rows((base[:20] + scale * noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float32))
        found = find_neighbours(near, base)
        assert found.copies(ratio).sum() >= 15
    assert alarms <= 20 * FALSE_ALARMS * 5


def test_copies_within_the_base_do_not_move_the_limit_much() -> None:
    base = rows(400, 32, latent=10)
    dirty = np.concatenate([base, base[:120]])
    clean_ratio = copy_ratio(find_neighbours(base, base, own=np.arange(400)), 100)
    dirty_ratio = copy_ratio(find_neighbours(dirty, dirty, own=np.arange(520)), 100)
    assert dirty_ratio == pytest.approx(clean_ratio, rel=0.2)


def test_rows_that_are_all_alike_are_copies_and_nothing_else_is() -> None:
    same = unit_rows(np.ones((30, 5), np.float32))
    typical = find_neighbours(same, same, own=np.arange(30))
    assert copy_ratio(typical, 30) == 0
    assert typical.copies(0).all()
    assert not find_neighbours(-same[:3], same).copies(0).any()

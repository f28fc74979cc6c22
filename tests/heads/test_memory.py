"""Memory: features that are read in chunks are never asked for at once, and nothing as long as they are is kept for every l2."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from embedpipe.heads import L2_GRID, ChunkedFeatures, fit_linear, fit_path


@pytest.mark.parametrize("solver", ["newton", "ridge"])
def test_chunks_are_small(solver: str) -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(15_000, 300)).astype(
        np.float32
    )  # more than newton takes to float64, or measures a metric with
    y = (X[:, 0] + random.normal(size=len(X)) > 0).astype(np.int64)
    asked: list[int] = []

    def read(rows: Any) -> np.ndarray:
        asked.append(len(X[rows]))
        return X[rows]

    head = fit_linear(ChunkedFeatures(X.shape, read), y, classes=("a", "b"), l2=1e-2, solver=solver)
    assert max(asked) < 4000
    np.testing.assert_allclose(
        head.weight, fit_linear(X, y, classes=("a", "b"), l2=1e-2, solver=solver).weight, atol=1e-5
    )


def test_ridge_keeps_no_scores_of_all_rows() -> None:
    random, classes = np.random.default_rng(0), [str(k) for k in range(5)]
    X, y = random.normal(size=(20_000, 8)).astype(np.float32), np.arange(20_000) % 5
    tracemalloc.start()
    fit_path(X, y, None, None, classes=classes, solver="ridge")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(L2_GRID) * len(X) * len(classes)

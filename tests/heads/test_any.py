"""Whatever the data: a fit is a valid head, or an error in the user's words."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpipe.errors import EmbedpipeError
from embedpipe.heads import fit_path

GRID = (1e-6, 1e-3, 1.0, 100.0)


def draw_data(seed: int, n: int, width: int, n_classes: int, *, kinds: str, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Features with ties, constant and doubled columns and columns times 1e3, as `kinds` says; classes may be missing."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, width))
    if "t" in kinds:
        X = X.round()
    if "c" in kinds:
        X[:, 0] = 7
    if "d" in kinds:
        X[:, -1] = X[:, 0]
    if "k" in kinds:
        X[:, ::2] *= 1e3
    y: Any = random.integers(n_classes, size=n)
    if "o" in kinds:
        y = np.arange(n) % n_classes  # one sample a class where n = C
    if task == "multilabel":
        y = (random.random((n, n_classes)) < random.random(n_classes)).astype(np.float32)
    return X.astype(np.float32), y if task != "regression" else X @ random.normal(size=width) + y * 1e3


def check_head(head: Any, X: np.ndarray) -> None:
    assert np.isfinite(head.weight).all()
    assert np.isfinite(head.bias).all()
    p = head.predict_proba(X)
    assert np.isfinite(p).all()
    if head.task == "single":
        np.testing.assert_allclose(p.sum(axis=1), 1)
    if head.task == "multilabel":
        assert ((p >= 0) & (p <= 1)).all()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(0, 12),
    n_val=st.integers(0, 5),
    width=st.integers(1, 8),
    n_classes=st.integers(1, 5),
    kinds=st.text("tcdko", max_size=4),
    solver=st.sampled_from(["auto", "lbfgs", "sklearn", "ridge"]),
    task=st.sampled_from(["single", "single", "multilabel", "regression"]),
    weight=st.sampled_from(["none", "random", "zeros"]),
    standardize=st.booleans(),
    several=st.booleans(),
)
def test_any_path(
    seed: int,
    n: int,
    n_val: int,
    width: int,
    n_classes: int,
    kinds: str,
    solver: str,
    task: str,
    weight: str,
    standardize: bool,
    several: bool,
) -> None:
    X, y = draw_data(seed, n, width, n_classes, kinds=kinds, task=task)
    X_val, y_val = draw_data(seed + 1, n_val, width, n_classes, kinds=kinds, task=task)
    weights = None if weight == "none" else np.random.default_rng(seed).uniform(0, 2, n) * (weight == "random")
    widths = (1, width - 1) if several and width > 1 else (width,)
    classes = ["target"] if task == "regression" else [str(c) for c in range(n_classes)]
    options: dict[str, Any] = {"classes": classes, "task": task, "solver": solver, "standardize": standardize}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(newton|lbfgs)", RuntimeWarning)  # says that it has not converged
        try:
            path = fit_path(X, y, X_val, y_val, widths=widths, grid=GRID, sample_weight=weights, **options)
        except EmbedpipeError:  # any other end is a defect
            return
    assert path.l2 in GRID
    check_head(path.head, X)

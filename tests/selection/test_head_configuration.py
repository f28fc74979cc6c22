"""Whatever the numbers: a valid head, a valid curve, valid folds, or an error in the user's words."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedpipe.errors import EmbedpipeError
from embedpipe.selection import HeadConfig, cross_fit
from embedpipe.selection._learning_curve import learning_curve

LETTERS = "abcdef"
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30, -1e18, 3.4e38]), st.floats(-100, 100, width=32), st.just(float("nan"))
)


@st.composite
def problems(
    draw: st.DrawFn, tasks: tuple[str, ...] = ("single",)
) -> tuple[HeadConfig, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A config, train and val; features may be constant, tied, huge or NaN, classes may be absent from either."""
    n, n_val, dim, n_classes = (draw(st.integers(low, high)) for low, high in ((1, 14), (0, 6), (1, 5), (1, 6)))
    plain = st.floats(-3, 3, width=32)
    values = draw(st.sampled_from([plain, st.sampled_from([0.0, 1.0]), NUMBERS]))
    labels, task = st.integers(0, n_classes - 1), draw(st.sampled_from(tasks))

    def table(rows: int) -> np.ndarray:
        cells = draw(st.lists(values, min_size=rows * dim, max_size=rows * dim))
        with np.errstate(over="ignore"):
            return np.array(cells, dtype=np.float32).reshape(rows, dim)

    def truth(rows: int) -> np.ndarray:
        if task == "multilabel":
            cells = draw(st.lists(st.sampled_from([0, 1]), min_size=rows * n_classes, max_size=rows * n_classes))
            return np.array(cells, dtype=np.float32).reshape(rows, n_classes)
        if task == "regression":
            return np.array(draw(st.lists(st.floats(-1e6, 1e6), min_size=rows, max_size=rows)), dtype=np.float64)
        return np.array(draw(st.lists(labels, min_size=rows, max_size=rows)), dtype=np.int64)

    config = HeadConfig(
        ("target",) if task == "regression" else tuple(LETTERS[:n_classes]),
        draw(st.sampled_from(["auto", "knn", "ridge"])),
        draw(st.sampled_from(["auto", 1e-6, 1.0, 1e4])),
        draw(st.booleans()),
        draw(st.sampled_from(["none", "balanced"])) if task == "single" else "none",
        task=task,
    )
    return config, table(n), truth(n), table(n_val), truth(n_val)


def check_probabilities(values: np.ndarray, n: int, n_classes: int, task: str = "single") -> None:
    assert values.shape == (n, n_classes)
    assert np.isfinite(values).all()
    if task == "regression":
        return
    assert ((values >= 0) & (values <= 1)).all()
    if task == "single":
        np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-9)


@pytest.mark.filterwarnings("ignore:newton has not converged")  # features of 1e30 that are not standardised
@given(problems(("single", "single", "multilabel", "regression")))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_valid_head_or_a_clear_error(
    problem: tuple[HeadConfig, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    config, X, y, X_val, y_val = problem
    with suppress(EmbedpipeError):  # any other end is a defect
        fitted = config.select(X, y, X_val, y_val)
        check_probabilities(fitted.head.predict_proba(X), len(X), len(config.classes), config.task)
        again = config.fit(X, y, l2=fitted.l2)
        check_probabilities(again.predict_proba(X), len(X), len(config.classes), config.task)


@pytest.mark.filterwarnings("ignore:newton has not converged")  # features of 1e30 that are not standardised
@given(problems(), st.integers(2, 4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_valid_folds_and_curves_or_a_clear_error(
    problem: tuple[HeadConfig, np.ndarray, np.ndarray, np.ndarray, np.ndarray], folds: int
) -> None:
    config, X, y, X_val, y_val = problem
    with suppress(EmbedpipeError):  # any other end is a defect
        _, probabilities, _ = cross_fit(X, y, range(len(y)), config, folds=folds, seed=0)
        check_probabilities(probabilities, len(y), len(config.classes))
    with suppress(EmbedpipeError):  # any other end is a defect
        others = {"val": (X_val, y_val)} if len(y_val) else {}
        curve = learning_curve(config, {"50%": 0.5}, (X, y), others, repeats=2, seed=-3)
        assert all(math.isfinite(one["accuracy"]) for point in curve for one in point["metrics"].values())


@pytest.mark.parametrize(
    ("solver", "l2", "chooses"), [("auto", "auto", True), ("auto", 0.1, False), ("knn", "auto", False)]
)
def test_only_a_path_needs_validation(solver: str, l2: float | str, chooses: bool) -> None:
    y = np.arange(8) % 2
    X = (np.random.default_rng(0).normal(size=(8, 2)) + y[:, None]).astype(np.float32)
    config = HeadConfig(("a", "b"), solver, l2)
    assert config.selects_l2 == chooses
    if not chooses:
        assert config.select(X, y, X[:0], y[:0]).l2 == (None if solver == "knn" else 0.1)

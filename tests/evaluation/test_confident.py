"""Confident learning on probabilities whose noise is known."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpipe.evaluation._label_errors import find_label_errors, self_confidence


def test_a_flipped_label_is_found_and_named() -> None:
    y = np.array([0, 0, 0, 1, 1, 1])
    P = np.array([[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.1, 0.9], [0.3, 0.7], [0.45, 0.55]])
    rows, suggested, scores = find_label_errors(P, y)
    assert (rows.tolist(), suggested.tolist()) == ([2], [1])
    assert scores.tolist() == [(1 + 0.9) / 2]


def test_a_class_that_heads_doubt_asks_for_less() -> None:
    """0.45 for class 2 is much, for it never gets more; 0.45 for class 1 is little."""
    y = np.array([0, 0, 1, 1, 2, 2, 2, 0, 0])
    P = np.array(
        [
            *[[0.9, 0.05, 0.05]] * 2, *[[0.1, 0.8, 0.1]] * 2, *[[0.35, 0.25, 0.4]] * 3,
            [0.3, 0.25, 0.45], [0.3, 0.45, 0.25],
        ]
    )  # fmt: skip
    np.testing.assert_allclose(self_confidence(P, y), [0.6, 0.8, 0.4])
    rows, suggested, _ = find_label_errors(P, y)
    assert (rows.tolist(), suggested.tolist()) == ([7], [2])


def test_a_label_that_is_ruled_out_is_suspected_though_no_class_is_confident() -> None:
    y = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    P = np.repeat(np.eye(3) * 0.88 + 0.04, 3, axis=0)
    P[2] = [0.02, 0.5, 0.48]
    rows, suggested, _ = find_label_errors(P, y)
    assert (rows.tolist(), suggested.tolist()) == ([2], [1])
    P[2] = [0.2, 0.42, 0.38]
    assert not len(find_label_errors(P, y)[0])


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_probabilities(n: int, n_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    P, y = rng.dirichlet(np.full(n_classes, 0.3), n), rng.integers(0, n_classes, n)
    rows, suggested, scores = find_label_errors(P, y)
    assert (suggested != y[rows]).all()
    assert np.isin(suggested, y).all()  # a class without samples has no confidence
    assert ((scores > 0.5) & (scores <= 1)).all()
    assert (np.diff(scores) <= 0).all()

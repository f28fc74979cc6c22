"""Gram: sums less those of a part are those of the rest, and heads fitted with them are those fitted from nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embedpipe.heads import Chunked, Gram
from embedpipe.heads._frame import make_frame
from embedpipe.heads._ridge import solve_path


def rows(n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of very different scales, far from zero; the last class is rare."""
    random = np.random.default_rng(0)
    y = np.minimum(np.arange(400) % (4 * n_classes), n_classes - 1)
    X = random.normal(size=(400, 30)) + random.normal(size=(n_classes, 30))[y] / 2
    return ((X + 5) * np.logspace(-3, 3, 30)).astype(np.float32), y


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_head_with_what_is_left_of_the_whole_is_the_head_from_nothing(n_classes: int, chunked: bool) -> None:
    X, y = rows(n_classes)
    whole: np.ndarray | Chunked = Chunked(X.shape, X.__getitem__) if chunked else X
    total = Gram.of(whole, y, n_classes + 1)  # one class has no rows
    gram = total - Gram.of(X[:90], y[:90], n_classes + 1, total.origin)
    classes = [str(k) for k in range(n_classes + 1)]
    frame = make_frame(X[90:], y[90:], classes=classes, standardize=True, sample_weight=None, gram=gram)
    assert frame.problem.moments is not None
    alone = replace(frame.problem, moments=None)
    l2s = [1.0, 1e-3, 1e-6]
    for one, other in zip(solve_path(frame.problem, l2s), solve_path(alone, l2s), strict=True):
        assert one.objective == pytest.approx(other.objective, rel=1e-8)
        assert one.loo_accuracy == other.loo_accuracy
        direction, wanted = (each.weight / np.linalg.norm(each.weight) for each in (one, other))
        np.testing.assert_allclose(direction, wanted, atol=1e-6)
        assert np.linalg.norm(one.weight) == pytest.approx(np.linalg.norm(other.weight), rel=1e-4)  # the factor


def test_sums_less_a_part_are_the_sums_of_the_rest() -> None:
    X, y = rows(3)
    whole = Gram.of(X, y, 3)
    left = whole - Gram.of(X[:150], y[:150], 3, whole.origin)
    rest = Gram.of(X[150:], y[150:], 3, whole.origin)
    assert left.count == rest.count == 250
    scale = np.sqrt(np.outer(np.diag(rest.products), np.diag(rest.products)))
    assert np.abs((left.products - rest.products) / scale).max() < 1e-12


def test_weighted_rows_are_measured_anew() -> None:
    X, y = rows(3)
    options = {"classes": "abc", "standardize": True, "gram": Gram.of(X, y, 3)}
    assert make_frame(X, y, sample_weight=1.0 + y, **options).problem.moments is None

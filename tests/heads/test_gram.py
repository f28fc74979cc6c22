"""Gram: sums minus those of a part are those of the rest, and give the same heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embedpipe.heads import ChunkedFeatures, Gram
from embedpipe.heads._ridge import solve_path
from embedpipe.heads._standardisation import make_problem


def rows(n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of very different scales, far from zero; the last class is rare."""
    random = np.random.default_rng(0)
    y = np.minimum(np.arange(400) % (4 * n_classes), n_classes - 1)
    X = random.normal(size=(400, 30)) + random.normal(size=(n_classes, 30))[y] / 2
    return ((X + 5) * np.logspace(-3, 3, 30)).astype(np.float32), y


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_gram_of_the_remaining_rows_gives_the_head_that_is_fitted_on_them(n_classes: int, chunked: bool) -> None:
    X, y = rows(n_classes)
    whole: np.ndarray | ChunkedFeatures = ChunkedFeatures(X.shape, X.__getitem__) if chunked else X
    total = Gram.from_rows(whole, y, n_classes + 1)  # one class has no rows
    gram = total - Gram.from_rows(X[:90], y[:90], n_classes + 1, total.origin)
    classes = [str(k) for k in range(n_classes + 1)]
    problem = make_problem(X[90:], y[90:], classes=classes, standardize=True, sample_weight=None, gram=gram)
    assert problem.moments is not None
    (weights, _, extra), (references, _, expected) = (
        solve_path(each, [1.0, 1e-3, 1e-6]) for each in (problem, replace(problem, moments=None))
    )
    assert extra["objective"] == pytest.approx(expected["objective"], rel=1e-8)
    assert extra["loo_accuracy"].tolist() == expected["loo_accuracy"].tolist()
    for weight, reference in zip(weights, references, strict=True):
        direction, expected_direction = (each / np.linalg.norm(each) for each in (weight, reference))
        np.testing.assert_allclose(direction, expected_direction, atol=1e-6)
        assert np.linalg.norm(weight) == pytest.approx(np.linalg.norm(reference), rel=1e-4)  # the factor


def test_sums_minus_a_part_are_the_sums_of_the_rest() -> None:
    X, y = rows(3)
    whole = Gram.from_rows(X, y, 3)
    left = whole - Gram.from_rows(X[:150], y[:150], 3, whole.origin)
    rest = Gram.from_rows(X[150:], y[150:], 3, whole.origin)
    assert left.count == rest.count == 250
    scale = np.sqrt(np.outer(np.diag(rest.products), np.diag(rest.products)))
    assert np.abs((left.products - rest.products) / scale).max() < 1e-12


def test_a_gram_is_ignored_with_sample_weights() -> None:
    X, y = rows(3)
    options = {"classes": "abc", "standardize": True, "gram": Gram.from_rows(X, y, 3)}
    assert make_problem(X, y, sample_weight=1.0 + y, **options).moments is None

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from embedpipe.errors import NonFiniteFeatures, UsageError
from embedpipe.heads import fit_knn
from embedpipe.heads._problem import MAX_BLOCK_NUMBERS, blocks

X, Y = load_digits(return_X_y=True)
TEN = tuple("0123456789")


def test_votes_are_those_of_scikit_learn_with_the_same_weights() -> None:
    X_train, X_test = X[:600], X[600:800]
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07)).fit(
        X_train, Y[:600]
    )
    found = fit_knn(X_train, Y[:600], classes=TEN).predict_proba(X_test)
    np.testing.assert_allclose(found, reference.predict_proba(X_test), atol=1e-4)
    assert (found.argmax(axis=1) == Y[600:800]).mean() > 0.88


def test_one_neighbour_recalls_the_training_set_and_k_is_at_most_n() -> None:
    assert (fit_knn(X, Y, classes=TEN, k=1).predict_proba(X).argmax(axis=1) == Y).all()
    everyone = fit_knn(X[:30], Y[:30], classes=TEN, k=500, temperature=1e6)
    shares = np.bincount(Y[:30], minlength=10) / 30
    np.testing.assert_allclose(everyone.predict_proba(X[:1])[0], shares, atol=1e-4)


def test_length_does_not_count_and_zero_rows_do_no_harm() -> None:
    head = fit_knn(np.vstack([X[:100], np.zeros((1, 64))]), Y[:101], classes=TEN)
    np.testing.assert_allclose(head.predict_proba(X[:5] * 1e4), head.predict_proba(X[:5]), atol=1e-4)
    assert np.isfinite(head.predict_proba(np.zeros((1, 64)))).all()
    assert np.isfinite(head.logits(X[:5])).all()


def test_wrong_arguments_are_told() -> None:
    for change in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match="positive"):
            fit_knn(X, Y, classes=TEN, **change)
    with pytest.raises(UsageError):
        fit_knn(X[:0], Y[:0], classes=TEN)
    with pytest.raises(NonFiniteFeatures):
        fit_knn(X + np.nan, Y, classes=TEN)


def test_few_queries_are_compared_at_a_time_with_many_training_images() -> None:
    head = fit_knn(X[:600], Y[:600], classes=TEN)
    parts = [head.predict_proba(X[start : start + 7]) for start in range(600, 800, 7)]
    np.testing.assert_allclose(np.vstack(parts)[:200], head.predict_proba(X[600:800]), atol=1e-6)
    many = MAX_BLOCK_NUMBERS // 7
    assert max(rows.stop - rows.start for rows in blocks(X[600:800], row_numbers=many)) == 7

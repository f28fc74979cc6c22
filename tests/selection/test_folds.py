"""Folds: even, stable, ties together; and no head sees what it predicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpipe.errors import UsageError
from embedpipe.selection import INNER_FOLDS, HeadConfig, assign_folds, cross_fit

CLASSES = ("a", "b", "c")


@given(st.integers(2, 6), st.integers(0, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_ties_stay_together_and_no_fold_is_empty(folds: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    y = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=np.int64)
    tie = np.array(data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n)), dtype=np.int64)
    if len(set(tie.tolist())) < folds:
        with pytest.raises(UsageError, match="separate images"):
            assign_folds(y, tie, folds=folds, seed=seed)
        return
    fold = assign_folds(y, tie, folds=folds, seed=seed)
    assert set(fold.tolist()) == set(range(folds))
    assert all(len(set(fold[tie == one].tolist())) == 1 for one in set(tie.tolist()))
    np.testing.assert_array_equal(fold, assign_folds(y, tie, folds=folds, seed=seed))


def test_classes_are_spread_evenly_and_the_seed_moves_them() -> None:
    y = np.repeat([0, 1, 2], [50, 20, 7])
    fold = assign_folds(y, np.arange(77), folds=5, seed=0)
    for label in range(3):
        counts = np.bincount(fold[y == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert np.bincount(fold).max() - np.bincount(fold).min() <= 2
    assert (fold != assign_folds(y, np.arange(77), folds=5, seed=1)).any()
    with pytest.raises(UsageError, match="expected 2 to 77"):
        assign_folds(y, np.arange(77), folds=1, seed=0)


def test_labels_without_meaning_are_not_predicted() -> None:
    """An l2 chosen on the held-out fold, or a copy in training, would show as an accuracy above chance."""
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(150, 200)), 2, axis=0).astype(np.float32)  # every image twice
    y = np.repeat(rng.integers(0, 2, 150), 2)
    ties = [f"image {k // 2}" for k in range(300)]
    _, probabilities, l2 = cross_fit(X, y, ties, HeadConfig(("a", "b")), folds=5, seed=0)
    assert 0.35 < np.mean(probabilities.argmax(axis=1) == y) < 0.65
    assert len(l2) == 5
    loose = cross_fit(X, y, range(300), HeadConfig(("a", "b"), l2=1e-6), folds=5, seed=0)[1]
    assert np.mean(loose.argmax(axis=1) == y) > 0.8  # what copies on both sides would have said


def test_each_fold_is_predicted_by_a_head_of_the_others() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(90) % 3
    X = (rng.normal(size=(90, 5)) + y[:, None]).astype(np.float32)
    config = HeadConfig(CLASSES)
    fold, probabilities, l2 = cross_fit(X, y, range(90), config, folds=3, seed=0)
    for number in range(3):
        held = fold == number
        group = np.arange(90)[~held]
        inner = assign_folds(y[~held], group, folds=INNER_FOLDS, seed=0) == 0
        train, val = (X[~held][~inner], y[~held][~inner]), (X[~held][inner], y[~held][inner])
        order = np.concatenate([group[~inner], group[inner]])
        assert l2[number] == config.select(*train, *val, group=order).l2
        head = config.fit(X[~held], y[~held], l2=l2[number])
        np.testing.assert_array_equal(probabilities[held], head.predict_proba(X[held]))

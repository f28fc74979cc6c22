from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from embedpipe.errors import UsageError
from embedpipe.evaluation import score_multilabel, wilson_interval
from embedpipe.evaluation._multilabel import average_precision


@given(n=st.integers(2, 40), n_classes=st.integers(2, 6), seed=st.integers(0, 999), ties=st.booleans())
def test_scores_are_those_of_scikit_learn(n: int, n_classes: int, seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    Y = (random.random((n, n_classes)) < 0.4).astype(int)
    Y[0], Y[1] = 0, 1  # every class has both kinds
    table = random.random((n, n_classes))
    table = table.round(1) if ties else table
    found, predicted = score_multilabel(table, Y), (table >= 0.5).astype(int)
    assert found["mean_average_precision"] == pytest.approx(reference.average_precision_score(Y, table))
    assert found["roc_auc"] == pytest.approx(reference.roc_auc_score(Y, table))
    assert found["micro_f1"] == pytest.approx(reference.f1_score(Y, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(Y, predicted, average="macro", zero_division=0))
    assert found["exact_match"] == pytest.approx(reference.accuracy_score(Y, predicted))
    assert found["exact_match_ci95"] == list(wilson_interval(round(found["exact_match"] * n), n))
    assert found["log_loss"] == pytest.approx(
        np.mean([reference.log_loss(y, p) for y, p in zip(Y.T, table.T, strict=True)])
    )
    assert found["n"] == n


@given(n=st.integers(3, 30), seed=st.integers(0, 999), ties=st.booleans())
def test_average_precision_without_each_sample(n: int, seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    y = random.random(n) < 0.4
    y[:3] = True, True, False
    scores = random.random(n).round(1 if ties else 9)
    value, left_out = average_precision(scores, y)
    assert value == pytest.approx(reference.average_precision_score(y, scores))
    rest = [np.arange(n) != one for one in range(n)]
    wanted = [reference.average_precision_score(y[kept], scores[kept]) for kept in rest]
    np.testing.assert_allclose(left_out, wanted)


@given(n=st.integers(1, 6), n_classes=st.integers(1, 4), seed=st.integers(0, 999))
def test_classes_of_one_kind_are_left_out(n: int, n_classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    Y, table = random.integers(2, size=(n, n_classes)), random.random((n, n_classes))
    found = score_multilabel(table, Y)
    assert (found["mean_average_precision"] is None) == (not Y.any())
    assert (found["roc_auc"] is None) == (not any(set(column) == {0, 1} for column in Y.T))
    assert all(value is None or np.isfinite(value).all() for value in found.values())


def test_by_hand() -> None:
    Y = [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    table = [[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.6, 0.4, 0.3]]  # predicted: a, ab, a
    found = score_multilabel(table, Y)
    assert found["mean_average_precision"] == found["roc_auc"] == 1  # the third class is left out of both
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("table", "Y"),
    [
        ([[0.5, 0.5]], [[1]]), ([0.5], [1]), ([], []), (np.empty((0, 2)), np.empty((0, 2))), ([[0.5]], [[2]]),
        ([[0.5]], [[0.5]]), ([[np.nan]], [[1]]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(table: object, Y: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        score_multilabel(table, Y)  # type: ignore[arg-type]

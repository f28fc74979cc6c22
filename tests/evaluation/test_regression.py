from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn import metrics as reference

from embedpipe.errors import UsageError
from embedpipe.evaluation import score_regression


@given(n=st.integers(3, 60), seed=st.integers(0, 999), ties=st.booleans())
def test_scores_are_those_of_scikit_learn_and_scipy(n: int, seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    y = random.normal(10, 3, n)
    predicted = y + random.normal(0, 2, n)
    if ties:
        y, predicted = y.round(), predicted.round()
        y[:2] = predicted[:2] = (1, 2)
    found = score_regression(predicted, y)
    assert found["r2"] == pytest.approx(reference.r2_score(y, predicted))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(y, predicted))
    assert found["rmse"] == pytest.approx(reference.root_mean_squared_error(y, predicted))
    assert found["spearman"] == pytest.approx(spearmanr(predicted, y).statistic)
    for name in ("r2", "mae", "rmse"):
        low, high = found[f"{name}_ci95"]
        assert low <= found[name] <= high
    assert found["n"] == n


@pytest.mark.parametrize(("predicted", "y"), [([1.0], [2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0, 1.0, 1.0], [1, 2, 3])])
def test_few_or_constant_values(predicted: list[float], y: list[float]) -> None:
    found = score_regression(predicted, y)
    assert (found["r2"] is None) == (len(set(y)) == 1)
    assert found["spearman"] is None
    assert (found["mae_ci95"] is None) == (len(y) == 1)
    assert all(value is None or np.isfinite(value).all() for value in found.values())


def test_perfect_predictions() -> None:
    y = np.arange(20.0)
    found = score_regression(y, y)
    assert (found["r2"], found["mae"], found["rmse"], found["spearman"]) == (1, 0, 0, pytest.approx(1))
    assert (found["r2_ci95"], found["mae_ci95"], found["rmse_ci95"]) == ([1, 1], [0, 0], [0, 0])


@pytest.mark.parametrize(
    ("predicted", "y"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]]), ([np.nan], [1.0]), ([1.0], [np.inf])]
)
def test_what_does_not_fit_is_refused(predicted: object, y: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        score_regression(predicted, y)  # type: ignore[arg-type]

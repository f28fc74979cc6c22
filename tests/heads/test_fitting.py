from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from embedpipe.errors import NonFiniteFeatures, UsageError
from embedpipe.evaluation import score
from embedpipe.heads import class_weights, fit_linear, fit_path
from embedpipe.heads._problem import Problem

TEN = tuple("0123456789")
X_DIGITS, Y_DIGITS = load_digits(return_X_y=True)


def small(n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(30) % n_classes
    return np.random.default_rng(0).normal(size=(30, 5)) + y[:, None], y


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "sklearn"])
@pytest.mark.parametrize("select", ["log-loss", "accuracy"])
def test_validation_picks_the_l2(solver: str, select: str) -> None:
    train, val = slice(0, 150), slice(150, 500)
    X, y = X_DIGITS, Y_DIGITS
    options = {"classes": TEN, "grid": (1e-5, 1e-3, 1e-2, 10.0), "solver": solver, "select": select}
    path = fit_path(X[train], y[train], X[val], y[val], **options)
    for point in path.points:
        head = fit_linear(X[train], y[train], classes=TEN, l2=point["l2"])
        scores = score(head.predict_proba(X[val]), y[val])
        assert point["val_accuracy"] == pytest.approx(scores["accuracy"], abs=0.01)
        assert point["val_log_loss"] == pytest.approx(scores["log_loss"], rel=0.02)
    if select == "accuracy":
        best = max(path.points, key=lambda point: (point["val_accuracy"], -point["val_log_loss"]))
    else:
        best = min(path.points, key=lambda point: point["val_log_loss"])
    assert path.l2 == best["l2"] == path.head.provenance["l2"]
    chosen = score(path.head.predict_proba(X[val]), y[val])
    assert chosen["accuracy"] == best["val_accuracy"] == path.correct.mean()
    assert chosen["log_loss"] == pytest.approx(path.losses.mean(), rel=1e-6)
    assert path.selected_on == "val"


def test_equal_accuracy_goes_to_the_lower_log_loss() -> None:
    X, y = np.array([[-2.0], [-1.0], [1.0], [2.0]]), np.array([0, 0, 1, 1])
    path = fit_path(X, y, X, y, classes=("a", "b"), grid=(1e-3, 1.0), select="accuracy")
    assert [point["val_accuracy"] for point in path.points] == [1, 1]
    assert path.l2 == 1e-3


def test_one_l2_needs_no_validation_and_a_grid_does() -> None:
    X, y = small()
    path = fit_path(X, y, None, None, classes=TEN[:3], l2=0.1)
    assert len(path.points) == 1
    assert "val_accuracy" not in path.points[0]
    assert path.l2 == 0.1
    with pytest.raises(UsageError, match="validation"):
        fit_path(X, y, X[:0], y[:0], classes=TEN[:3])


def test_objective_counts_the_penalty_on_weights_and_not_on_the_bias() -> None:
    X, y = small()
    problem = Problem(X, y, np.full(30, 1 / 30), 3)
    weight, bias = np.ones((3, 5)), np.array([5.0, 0.0, 0.0])
    plain = problem.objective(weight, bias, 0.0)
    assert problem.objective(weight, bias, 2.0) == pytest.approx(plain + 15)
    assert problem.objective(0 * weight, 0 * bias, 1.0) == pytest.approx(np.log(3))


def test_objective_of_one_logit_is_that_of_its_two_rows() -> None:
    X, y = small(2)
    w, b = np.random.default_rng(3).normal(size=(1, 5)), np.array([0.3])
    problem = Problem(X, y, np.full(30, 1 / 30), 2)
    one = problem.objective(w, b, 0.1)
    two = problem.objective(np.vstack([-w / 2, w / 2]), np.array([-0.15, 0.15]), 0.2)
    assert one == pytest.approx(two)


def test_objective_divides_sample_weights_by_their_sum() -> None:
    X, y = small()
    once, again, even = (
        Problem(X, y, weights, 3).objective(np.eye(3, 5), np.zeros(3), 0.1)
        for weights in (np.arange(30.0), 9 * np.arange(30.0), np.ones(30))
    )
    assert again == pytest.approx(once)
    assert once != pytest.approx(even)


def test_standardiser_is_folded_in() -> None:
    random = np.random.default_rng(0)
    X, y = small()
    scale, shift = 10.0 ** random.integers(-3, 4, 5), random.normal(size=5) * 100
    raw = (X * scale + shift * scale).astype(np.float32)
    exact = raw.astype(np.float64)
    Z = (exact - exact.mean(axis=0)) / np.maximum(exact.std(0), 0.01 * np.median(exact.std(0)))
    folded = fit_linear(raw, y, classes=TEN[:3], l2=0.1)
    plain = fit_linear(Z, y, classes=TEN[:3], l2=0.1, standardize=False)
    np.testing.assert_allclose(folded.logits(raw), plain.logits(Z), atol=2e-3)
    # what is stored computes what was solved, rounding included
    again = folded.weight.astype(np.float64) * (exact.std(0))
    np.testing.assert_allclose(
        folded.logits(raw)[:, 0],
        ((exact - exact.mean(0)) / exact.std(0)) @ again[0]
        + (folded.bias[0] + folded.weight[0].astype(np.float64) @ exact.mean(0)),
        atol=1e-5,
    )


def test_dead_features_are_not_blown_up() -> None:
    X, y = small()
    X = np.hstack([X, np.full((30, 1), 3.0)])
    X[0, 5] += 1e-6
    head = fit_linear(X, y, classes=TEN[:3], l2=1e-3)
    assert np.abs(head.logits(X + np.eye(6)[5]) - head.logits(X)).max() < 1


def test_features_that_are_all_dead_leave_the_class_frequencies() -> None:
    y = np.array([0, 0, 0, 1])
    head = fit_linear(np.full((4, 3), 0.1), y, classes=("a", "b"), l2=1e-3)
    np.testing.assert_allclose(head.predict_proba(np.full((1, 3), 0.1)), [[0.75, 0.25]], atol=1e-3)


@pytest.mark.parametrize("kept", [(0, 1, 3), (1, 3)])
def test_a_class_without_samples_is_never_predicted_and_harms_no_other(kept: tuple[int, ...]) -> None:
    X, y = small(len(kept))
    y = np.array(kept)[y]
    head = fit_linear(X, y, classes=tuple("abcd"), l2=1e-2)
    probabilities = head.predict_proba(X)
    absent = sorted({0, 1, 2, 3} - set(kept))
    assert probabilities.shape == (30, 4)
    assert probabilities[:, absent].max() < 1e-8
    dense = fit_linear(X, np.searchsorted(kept, y), classes=tuple("xyz"[: len(kept)]), l2=1e-2)
    np.testing.assert_allclose(probabilities[:, kept], dense.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_bad_feature_names_its_row(value: float) -> None:
    X, y = small()
    X[7, 2] = value
    with pytest.raises(NonFiniteFeatures, match="row 7") as caught:
        fit_linear(X, y, classes=TEN[:3], l2=1.0)
    assert caught.value.row == 7


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"y": np.zeros(30, dtype=int)}, "training samples: 1, expected at least 2"),
        ({"y": np.arange(30) % 4}, "label 3 in row 3"),
        ({"y": np.arange(29) % 3}, r"\(29,\)"),
        ({"X": np.zeros((30, 0))}, r"\(30, 0\)"),
        ({"l2": 0.0}, "l2 = 0"),
        ({"l2": np.nan}, "l2 = nan"),
        ({"solver": "lbfsg"}, "did you mean 'lbfgs'"),
        ({"sample_weight": -np.ones(30)}, "not negative"),
        ({"sample_weight": np.zeros(30)}, "training samples: 0"),
    ],
)
def test_wrong_arguments_are_told(change: dict[str, object], found: str) -> None:
    X, y = small()
    arguments: dict[str, object] = {"X": X, "y": y, "classes": TEN[:3], "l2": 1.0, **change}
    with pytest.raises(UsageError, match=found):
        fit_linear(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"l2": "auto"}, "l2 = 'auto', expected a positive number"),
        ({"l2": None}, "l2 = None, expected a positive number"),
        ({"task": "ranks"}, "no task 'ranks', expected single, multilabel, regression"),
        ({"y": np.arange(30) % 3 + 0.5}, "label 0.5 in row 0, expected a whole number"),
        ({"y": ["a"] * 30}, "y of <U1, expected int64"),
    ],
)
def test_what_is_no_number_and_no_task_is_told(change: dict[str, Any], found: str) -> None:
    wanted = {"X": np.random.default_rng(0).normal(size=(30, 2)), "y": np.arange(30) % 3, "l2": 0.1, **change}
    with pytest.raises(UsageError, match=found):
        fit_linear(**wanted, classes=("a", "b", "c"))


def test_class_weights_balance() -> None:
    y = np.array([0, 0, 0, 2])
    weights = class_weights(y, 3)
    assert weights == pytest.approx([2 / 3, 0, 2])
    assert weights[y].mean() == pytest.approx(1)
    X = np.random.default_rng(0).normal(size=(4, 2))
    balanced = fit_linear(X, y, classes=tuple("abc"), l2=1e3, sample_weight=weights[y])
    np.testing.assert_allclose(balanced.predict_proba(X)[:, [0, 2]], 0.5, atol=0.01)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(2, 12), width=st.integers(1, 15), n_classes=st.integers(2, 5))
def test_any_small_problem_gives_a_valid_head_or_a_clear_error(
    data: st.DataObject, n: int, width: int, n_classes: int
) -> None:
    cells = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0])
    rows = st.lists(st.lists(cells, min_size=width, max_size=width), min_size=n, max_size=n)
    X = np.array(data.draw(rows), dtype=np.float32)
    y = np.array(data.draw(st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n)))
    weights = np.array(data.draw(st.lists(st.just(0.0) | st.floats(1e-4, 5), min_size=n, max_size=n)))
    l2 = data.draw(st.sampled_from([1e-6, 1e-2, 100.0]))
    try:
        with warnings.catch_warnings(action="error"):
            head = fit_linear(X, y, classes=TEN[:n_classes], l2=l2, sample_weight=weights)
    except UsageError:
        assert len(np.unique(y[weights > 0])) < 2
        return
    probabilities = head.predict_proba(X)
    assert np.isfinite(head.weight).all()
    assert np.isfinite(head.bias).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    frequencies = np.bincount(y, weights, n_classes) / weights.sum()
    found = np.average(probabilities, axis=0, weights=weights)
    np.testing.assert_allclose(found, frequencies, atol=0.02)  # the bias is free


def test_a_weight_that_moves_no_digit_is_none() -> None:
    X, y = small()
    X, y, weights = np.vstack([X, X[:1] + 50]), np.append(y, 3), np.append(np.ones(len(y)), 1e-300)
    with warnings.catch_warnings(action="error"):
        head = fit_linear(X, y, classes=TEN[:4], l2=1e-6, sample_weight=weights)
        none = fit_linear(X, y, classes=TEN[:4], l2=1e-6, sample_weight=weights * (weights == 1))
    np.testing.assert_array_equal(head.bias, none.bias)
    np.testing.assert_array_equal(head.weight, none.weight)


def test_features_that_are_mostly_dead_are_not_blown_up() -> None:
    X, y = small()
    dead = np.tile(np.linspace(0.1, 0.9, 8), (30, 1))
    X = np.hstack([X, dead]).astype(np.float32)
    head = fit_linear(X, y, classes=TEN[:3], l2=1e-3)
    moved = X + np.repeat([0, 1], [5, 8])
    np.testing.assert_allclose(head.logits(moved), head.logits(X), atol=1e-3)

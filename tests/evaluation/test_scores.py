from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from embedpipe.errors import UsageError
from embedpipe.evaluation import (
    confusion_matrix,
    expected_calibration_error,
    mean_interval,
    per_class,
    score,
    score_fully,
    wilson_interval,
)
from embedpipe.evaluation._scores import balanced_accuracy, balanced_accuracy_interval, macro_f1_interval


def guesses(n: int, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, n_classes)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities, random.integers(n_classes, size=n)


@given(n=st.integers(1, 60), n_classes=st.integers(2, 6), seed=st.integers(0, 999))
def test_scores_are_those_of_scikit_learn(n: int, n_classes: int, seed: int) -> None:
    probabilities, y = guesses(n, n_classes, seed)
    predicted, scores = probabilities.argmax(axis=1), score(probabilities, y)
    recalls = [np.mean(predicted[y == c] == c) for c in np.unique(y)]
    f1 = reference.f1_score(y, predicted, average="macro", zero_division=0)
    assert scores["accuracy"] == pytest.approx(reference.accuracy_score(y, predicted))
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert scores["macro_f1"] == pytest.approx(f1)
    labels = np.arange(n_classes)
    loss = reference.log_loss(y, probabilities, labels=labels)
    assert scores["log_loss"] == pytest.approx(loss)
    matrix = reference.confusion_matrix(y, predicted, labels=labels)
    assert np.array_equal(confusion_matrix(y, predicted, n_classes), matrix)
    low, high = scores["accuracy_ci95"]
    assert 0 <= low <= scores["accuracy"] <= high <= 1
    assert scores["n"] == n


@given(n=st.integers(1, 40), n_classes=st.integers(2, 8), seed=st.integers(0, 999), ties=st.booleans())
def test_full_scores_of_any_size(n: int, n_classes: int, seed: int, ties: bool) -> None:
    probabilities, y = guesses(n, n_classes, seed)
    probabilities = probabilities.round(1) if ties else probabilities
    found = score_fully(probabilities, y)
    assert found.items() >= score(probabilities, y).items()
    for name in ("balanced_accuracy", "macro_f1", "log_loss"):
        interval = found[f"{name}_ci95"]
        if name == "log_loss" and n == 1:
            assert interval is None
        else:
            assert 0 <= interval[0] <= found[name] * (1 + 1e-12) + 1e-12
            assert interval[1] >= found[name] * (1 - 1e-12)
    assert ("top5" in found) == (n_classes > 5)
    assert ("roc_auc" in found) == (n_classes == 2)
    json.dumps(found, allow_nan=False)
    if n_classes > 5 and not ties:
        top5 = reference.top_k_accuracy_score(y, probabilities, k=5, labels=np.arange(n_classes))
        assert found["top5"] == pytest.approx(top5)
    if n_classes == 2:
        kinds = len(np.unique(y))
        auc = reference.roc_auc_score(y, probabilities[:, 1]) if kinds == 2 else None
        assert found["roc_auc"] == (auc if auc is None else pytest.approx(auc))


def test_of_equal_probabilities_the_first_classes_count() -> None:
    found = score_fully(np.full((6, 6), 1 / 6), np.arange(6))
    assert (found["top5"], found["accuracy"]) == (5 / 6, 1 / 6)


@given(n=st.integers(1, 60), n_classes=st.integers(2, 6), seed=st.integers(0, 999))
def test_rows_of_classes_are_those_of_scikit_learn(n: int, n_classes: int, seed: int) -> None:
    probabilities, y = guesses(n, n_classes, seed)
    predicted, labels = probabilities.argmax(axis=1), np.arange(n_classes)
    rows = per_class(confusion_matrix(y, predicted, n_classes))
    wanted = reference.precision_recall_fscore_support(y, predicted, labels=labels, zero_division=np.nan)
    for row, precision, recall, _, support in zip(rows, *wanted, strict=True):
        assert row["n"] == support
        assert row["precision"] == (None if np.isnan(precision) else pytest.approx(precision))
        assert row["recall"] == (None if np.isnan(recall) else pytest.approx(recall))
        assert (row["recall_ci95"] is None) == (support == 0)
    f1 = [row["f1"] for row in rows if row["f1"] is not None]
    assert np.mean(f1) == pytest.approx(score(probabilities, y)["macro_f1"])


def test_intervals_of_equal_classes_are_those_of_the_accuracy() -> None:
    """One accuracy in two classes of one size: nearly Wilson's interval, and exactly so where all is right."""
    half = np.array([[90, 10], [10, 90]])
    assert balanced_accuracy_interval(half) == pytest.approx(wilson_interval(180, 200), abs=5e-4)
    assert macro_f1_interval(half) == pytest.approx(wilson_interval(180, 200), abs=5e-4)
    right = np.diag([100, 100])
    assert balanced_accuracy_interval(right) == pytest.approx(wilson_interval(200, 200))
    assert macro_f1_interval(right) == pytest.approx(wilson_interval(200, 200))


def test_a_class_of_one_sample_makes_the_interval_wide() -> None:
    confusion = np.array([[99, 1], [0, 1]])
    low, high = balanced_accuracy_interval(confusion)
    assert balanced_accuracy(confusion) == 0.995
    assert high - low > 0.05
    low, high = balanced_accuracy_interval(np.array([[100, 0], [1, 0]]))
    assert high - low > 0.5


def test_the_interval_of_a_mean_leans_to_the_long_tail() -> None:
    values = np.random.default_rng(0).exponential(size=50)
    low, high = mean_interval(values) or (0, 0)
    assert high - values.mean() > 1.1 * (values.mean() - low)
    mirrored = mean_interval(-values) or (0, 0)
    assert mirrored == pytest.approx([-high, -low])
    # n = 10, no skewness: Student's t, 2.2622 at 9 degrees of freedom
    even = np.array([-2.0, -1, -1, 0, 0, 0, 0, 1, 1, 2])
    assert (mean_interval(even) or [0])[0] == pytest.approx(-2.2622 * even.std(ddof=1) / np.sqrt(10), rel=2e-3)
    assert mean_interval([3.0]) is None
    assert mean_interval([3.0, 3.0]) == [3, 3]


def test_wilson_interval_is_the_published_one() -> None:
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_interval_covers() -> None:
    n, p = 100, 0.9
    draws = np.random.default_rng(0).binomial(n, p, size=4000)
    covered = [low <= p <= high for low, high in (wilson_interval(int(k), n) for k in draws)]
    assert 0.93 <= np.mean(covered) <= 0.965


def test_ece_by_hand() -> None:
    confidence = np.array([0.6, 0.6, 0.9, 0.9, 0.9, 0.9])
    correct = np.array([True, False, True, True, True, True])
    # bin of 0.6: |0.6 - 0.5|, a third of the samples; bin of 0.9: |0.9 - 1|, two thirds
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.1)
    assert expected_calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0
    edge = expected_calibration_error(np.array([0.42, 7 / 15]), np.array([True, False]))
    assert edge == pytest.approx((1 - 0.42 - 7 / 15) / 2)  # one bin, (6/15, 7/15]


def test_calibrated_probabilities_have_a_small_ece_and_sharpened_ones_a_large() -> None:
    probabilities, _ = guesses(20_000, 3, seed=1)
    draw = np.random.default_rng(2).random((len(probabilities), 1))
    y = (probabilities.cumsum(axis=1) < draw).sum(axis=1)
    sharp = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    assert score(probabilities, y)["ece"] < 0.02 < 0.1 < score(sharp, y)["ece"]


def test_a_certain_mistake_has_a_finite_loss() -> None:
    assert np.isfinite(score(np.array([[1.0, 0.0]]), np.array([1]))["log_loss"])


@pytest.mark.parametrize("y", [[], [0], [0, 2], [0, -1]])
def test_labels_that_do_not_fit_are_refused(y: list[int]) -> None:
    with pytest.raises(UsageError):
        score(np.full((len(y) if len(y) != 1 else 2, 2), 0.5), np.array(y, dtype=int))


def test_importing_metrics_and_heads_leaves_torch_and_scikit_learn_out() -> None:
    code = "import sys, embedpipe.evaluation, embedpipe.heads; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "sklearn"} & {*found.stdout.split()}

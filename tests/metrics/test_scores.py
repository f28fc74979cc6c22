from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from embedpipe.errors import UsageError
from embedpipe.metrics import confusion_matrix, expected_calibration_error, score, wilson_interval


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
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(0.1)
    assert expected_calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0
    edge = expected_calibration_error(np.array([0.42, 0.5]), np.array([True, False]), bins=10)
    assert edge == pytest.approx(0.04)  # one bin, (0.4, 0.5]: |0.92 - 1| / 2


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
    code = "import sys, embedpipe.metrics, embedpipe.heads; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "sklearn"} & {*found.stdout.split()}

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedpipe.evaluation import (
    TEMPERATURES,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    reliability,
    scale_temperature,
)


def drawn(n: int, n_classes: int, seed: int, sharper: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities whose logits are `sharper` times too large, and labels drawn from the true ones."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, n_classes)) * 2
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = (true.cumsum(axis=1) < random.random((n, 1))).sum(axis=1)
    sharp = np.exp(logits * sharper)
    return sharp / sharp.sum(axis=1, keepdims=True), np.minimum(y, n_classes - 1)


@pytest.mark.parametrize("sharper", [0.4, 1.0, 3.0])
def test_the_temperature_is_what_sharpened_the_logits(sharper: float) -> None:
    probabilities, y = drawn(20_000, 4, seed=0, sharper=sharper)
    temperature = fit_temperature(probabilities, y)
    assert temperature == pytest.approx(sharper, rel=0.04)
    others, truth = drawn(5_000, 4, seed=1, sharper=sharper)
    softened = scale_temperature(others, temperature)
    assert expected_calibration_error(softened.max(axis=1), softened.argmax(axis=1) == truth) < 0.02


@given(n=st.integers(1, 40), n_classes=st.integers(2, 6), seed=st.integers(0, 999), sharper=st.floats(0.1, 8))
def test_no_other_temperature_has_a_lower_loss(n: int, n_classes: int, seed: int, sharper: float) -> None:
    probabilities, y = drawn(n, n_classes, seed, sharper)
    temperature = fit_temperature(probabilities, y)
    best = log_loss(scale_temperature(probabilities, temperature), y)
    assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
    for other in np.geomspace(*TEMPERATURES, 50):
        assert best <= log_loss(scale_temperature(probabilities, float(other)), y) + 1e-8


def test_data_without_an_optimum_end_at_a_bound() -> None:
    right = np.array([[0.7, 0.3], [0.4, 0.6]])
    assert fit_temperature(right, np.array([0, 1])) == TEMPERATURES[0]
    assert fit_temperature(right, np.array([1, 0])) == TEMPERATURES[1]
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.isfinite(fit_temperature(certain, np.array([0, 1])))
    assert fit_temperature(certain, np.array([1, 0])) == TEMPERATURES[1]
    assert fit_temperature(np.full((3, 2), 0.5), np.array([0, 0, 1])) == 1.0  # every temperature is as good


@given(n=st.integers(1, 30), n_classes=st.integers(2, 6), seed=st.integers(0, 999), temperature=st.floats(0.1, 10))
def test_softening_keeps_the_order_and_can_be_undone(n: int, n_classes: int, seed: int, temperature: float) -> None:
    probabilities, _ = drawn(n, n_classes, seed)
    softened = scale_temperature(probabilities, temperature)
    assert np.array_equal(softened.argmax(axis=1), probabilities.argmax(axis=1))
    np.testing.assert_allclose(softened.sum(axis=1), 1)
    np.testing.assert_allclose(scale_temperature(softened, 1 / temperature), probabilities, atol=1e-9)


@given(n=st.integers(1, 60), n_classes=st.integers(2, 5), seed=st.integers(0, 999))
def test_the_bins_of_a_reliability_diagram_add_up_to_the_ece(n: int, n_classes: int, seed: int) -> None:
    probabilities, y = drawn(n, n_classes, seed)
    bins = reliability(probabilities, y)
    correct = probabilities.argmax(axis=1) == y
    assert sum(one["n"] for one in bins) == n
    assert sum(one["n"] * (one["accuracy"] or 0) for one in bins) == pytest.approx(correct.sum())
    for one in bins:
        assert one["confidence"] is None or one["low"] < one["confidence"] <= one["high"] + 1e-12
        assert (one["confidence"] is None) == (one["n"] == 0)
    gaps = [one["n"] * abs((one["confidence"] or 0) - (one["accuracy"] or 0)) for one in bins]
    assert sum(gaps) / n == pytest.approx(expected_calibration_error(probabilities.max(axis=1), correct))

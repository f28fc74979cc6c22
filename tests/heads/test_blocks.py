"""A head on blocks of features: weights on raw features, and the same influence of blocks of any width."""

from __future__ import annotations

import numpy as np
import pytest

from embedpipe.errors import NonFiniteFeatures, UsageError
from embedpipe.heads import ChunkedFeatures, block_scale_factors, fit_linear, fit_path

CLASSES = ("a", "b", "c")
RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 120)
NARROW = (np.eye(3)[Y] + RNG.normal(0, 0.4, (120, 3))).astype(np.float32) * 50 + 7
WIDE = RNG.normal(0, 1, (120, 300)).astype(np.float32)
X = np.hstack([NARROW, WIDE])


def test_weights_are_those_of_raw_features() -> None:
    """Weights on raw features give the logits of a head on what was scaled by hand."""
    head = fit_linear(X, Y, classes=CLASSES, widths=(3, 300), l2=0.1)
    mean, std = X.mean(axis=0), X.std(axis=0)
    scaled = (X - mean) / std * np.repeat([np.sqrt(303 / 6), np.sqrt(303 / 600)], [3, 300])
    wanted = fit_linear(scaled, Y, classes=CLASSES, l2=0.1, standardize=False)
    np.testing.assert_allclose(head.logits(X), wanted.logits(scaled), atol=3e-3)
    assert head.provenance["standardize"] is True
    assert head.provenance["blocks"] == [3, 300]


def test_blocks_have_rows_of_the_same_length_and_l2_its_meaning() -> None:
    scales = block_scale_factors((64, 2048))
    lengths = scales**2 * (64, 2048)
    assert lengths[0] == pytest.approx(lengths[1])
    assert lengths.sum() == pytest.approx(64 + 2048)
    np.testing.assert_allclose(block_scale_factors((7, 7)), 1)


def test_a_wide_block_of_noise_does_not_drown_a_narrow_one() -> None:
    options = {"classes": CLASSES, "l2": 1.0}
    together = fit_path(X[:60], Y[:60], X[60:], Y[60:], widths=(3, 300), **options)
    plain = fit_path(X[:60], Y[:60], X[60:], Y[60:], **options)
    assert together.points[0]["val_accuracy"] > plain.points[0]["val_accuracy"] + 0.1


def test_one_block_is_an_ordinary_head() -> None:
    one = fit_path(X, Y, X, Y, widths=(303,), classes=CLASSES, l2=0.1).head
    plain = fit_path(X, Y, X, Y, classes=CLASSES, l2=0.1).head
    np.testing.assert_array_equal(one.weight, plain.weight)
    assert one.provenance == plain.provenance


def test_a_block_of_another_scale_counts_as_much() -> None:
    small = np.hstack([NARROW * np.float32(1e-4), WIDE])
    options = {"classes": CLASSES, "widths": (3, 300), "l2": 0.1}
    plain, scaled = fit_linear(X, Y, **options), fit_linear(small, Y, **options)
    np.testing.assert_allclose(scaled.predict_proba(small), plain.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize("unit", [1e-60, 1e60])
def test_numbers_of_any_unit(unit: float) -> None:
    options = {"classes": ("target",), "widths": (3, 300), "l2": 0.1, "task": "regression"}
    plain, other = (fit_linear(X, NARROW[:, 0].astype(np.float64) * scale, **options) for scale in (1.0, unit))
    np.testing.assert_allclose(other.predict_proba(X) / unit, plain.predict_proba(X), rtol=1e-6)


def test_blocks_are_read_in_chunks() -> None:
    options = {"classes": CLASSES, "widths": (3, 300), "l2": 0.1}
    whole, chunked = (fit_linear(one, Y, **options) for one in (X, ChunkedFeatures(X.shape, X.__getitem__)))
    np.testing.assert_allclose(chunked.weight, whole.weight, atol=1e-6)


def test_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="302 features together, expected 303"):
        fit_linear(X, Y, widths=(3, 299), classes=CLASSES, l2=0.1)
    broken = X.copy()
    broken[7, 5] = np.nan
    with pytest.raises(NonFiniteFeatures, match="row 7"):
        fit_linear(broken, Y, widths=(3, 300), classes=CLASSES, l2=0.1)

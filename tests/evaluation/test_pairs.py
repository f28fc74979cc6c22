from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from embedpipe.evaluation import mcnemar, paired_interval


@given(b=st.integers(0, 300), c=st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    wanted = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_of_many_disagreements() -> None:
    assert mcnemar(50_000, 50_000) == 1
    assert mcnemar(49_000, 51_000) == pytest.approx(binomtest(49_000, 100_000).pvalue, rel=1e-6)
    assert 0 <= mcnemar(0, 1_000_000) < 1e-300


@given(b=st.integers(0, 50), c=st.integers(0, 50), same=st.integers(0, 500))
def test_the_interval_is_around_the_difference(b: int, c: int, same: int) -> None:
    n = b + c + same
    if n:
        low, high = paired_interval(b, c, n)
        assert -1 <= low <= (c - b) / n <= high <= 1
        assert (-high, -low) == pytest.approx(paired_interval(c, b, n))
        assert low < high

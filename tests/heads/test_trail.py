"""Sweeps of many classes: what saves products leads to the same optimum, and is not trusted where it is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedpipe.heads import L2_GRID, _entries, _trail
from embedpipe.heads._entries import Entries
from embedpipe.heads._newton import solve_path
from embedpipe.heads._problem import Problem
from embedpipe.heads._starts import Solved
from embedpipe.heads._sweeps import Metric, Sweeps
from embedpipe.heads._trail import Beside, Record, Trail
from tests.heads.test_newton import even, gap, hard, standardised

N, WIDTH, CLASSES = 17_000, 256, 40  # large enough to be swept in float32


@pytest.fixture(autouse=True)
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every processor, though only some gain by it; and pairs are counted however small the problem."""
    monkeypatch.setattr("embedpipe.heads._sweeps.has_bfloat16", lambda: True)
    monkeypatch.setattr(_trail, "LARGE", 1)


def problem_of(n: int = N, width: int = WIDTH, n_classes: int = CLASSES, *, labels: bool = False) -> Problem:
    X, y = hard(n, width, n_classes)
    Z = standardised(X).astype(np.float32)
    if labels:
        return even(
            Z, np.eye(n_classes, dtype=np.int64)[y] | np.eye(n_classes, dtype=np.int64)[(y * 7) % n_classes], n_classes
        )
    return even(Z, y, n_classes)


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts: dict[str, int] = {}

    def count(cls: type, name: str, key: Callable[..., str | None]) -> None:
        made = getattr(cls, name)

        def counting(self: Any, *given: Any, **more: Any) -> Any:
            found = made(self, *given, **more)
            if which := key(*given, found):
                counts[which] = counts.get(which, 0) + 1
            return found

        monkeypatch.setattr(cls, name, counting)

    count(Trail, "value_beside", lambda _W, _b, beside, _allowed, _found: "beside" if beside else "alone")
    count(Trail, "_short_weights", lambda _W, _b, _allowed, found: "short" if found else None)
    count(Trail, "_gradient_beside", lambda _error, _beside, _allowed, found: "off" if found is None else "near")
    count(Entries, "curve", lambda *_: "few")
    count(Sweeps, "curve", lambda *_: "all")
    return counts


@pytest.mark.parametrize("labels", [False, True])
def test_a_path_with_few_products_ends_where_nothing_is_left_to_gain(
    labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, counts = problem_of(labels=labels), counted(monkeypatch)
    l2s = sorted(L2_GRID, reverse=True)
    solutions = solve_path(problem, l2s)
    assert max(gap(problem, found, l2) for l2, found in zip(l2s, solutions, strict=True)) <= 1e-6
    assert counts["beside"] == len(l2s) - 1
    assert counts["near"] > 0.8 * len(l2s)
    assert counts["short"] > 5
    assert counts["few"] > counts["all"]


@pytest.mark.parametrize("labels", [False, True])
def test_where_pairs_do_not_do_all_are_counted(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps gain little then; with the whole Hessian the path ends at its optima."""
    problem, counts = problem_of(n_classes=24, labels=labels), counted(monkeypatch)
    l2s = sorted(L2_GRID, reverse=True)
    solutions = solve_path(problem, l2s)
    assert max(gap(problem, found, l2) for l2, found in zip(l2s, solutions, strict=True)) <= 1e-6
    assert counts["few"] > 0


def trail_of(problem: Problem) -> Trail:
    trail = Trail(problem)
    trail.shorten(trail.measure(), 1e-6, turned=True)
    return trail


def some_weights(seed: int, *, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    W = scale * torch.randn(1, CLASSES, WIDTH, dtype=torch.float64, generator=random)
    return W, torch.randn(1, CLASSES, dtype=torch.float64, generator=random)


def test_what_follows_from_points_nearby_is_what_a_sweep_finds() -> None:
    """On a curve logits are added up, once: not those that were added up before."""
    trail = trail_of(problem_of())
    (W, b), (dW, db) = some_weights(0), some_weights(1, scale=0.003)
    records: list[Record] = []
    for step in range(3):
        trail.value(W + step * dW, b + step * db)
        assert trail.last
        records.append(trail.last)
    expected = trail.value(W + 3 * dW, b + 3 * db)
    for exact in (True, False):
        beside = Beside(records[-3:], [1.0, -3.0, 3.0])
        assert beside.on_curve is exact
        found = trail.value_beside(W + 3 * dW, b + 3 * db, beside, lambda _, exact=exact: float(exact))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
        records.append(trail.last)


@pytest.mark.parametrize("broken", ["rows", "record"])
def test_a_gradient_that_is_off_is_found_out_and_taken_anew(broken: str) -> None:
    trail = trail_of(problem_of())
    (W, b), (dW, db) = some_weights(0), some_weights(1, scale=0.01)
    trail.value(W, b)
    last = trail.last
    assert last
    assert trail._turned
    if broken == "rows":
        trail._turned[1][:, :8] = 0
    else:
        last.gradient[0] += 1e-3
    found = trail.value_beside(W + dW, b + db, Beside([last]), lambda _: 1e-9)
    expected = trail.value(W + dW, b + db)
    np.testing.assert_array_equal(found[1], expected[1])


def test_few_digits_are_refused_where_they_would_be_seen() -> None:
    trail = trail_of(problem_of())
    W, b = some_weights(0, scale=1e-3)
    for allowed, refused in ((1e-6, False), (1e-16, True), (1e-6, True)):  # l2 falls: once refused, not asked again
        assert (trail._short_weights(W, b, allowed) is None) is refused


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("n", [4, 1000, 1027])
def test_pairs_make_up_the_hessian(apart: bool, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them; of nearly all the rest is small, and its covariance stands for it."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(n, WIDTH, generator=random).bfloat16()
    logits = 3 * torch.randn(CLASSES, n, generator=random)
    p = logits.sigmoid() if apart else logits.softmax(0)
    weights = torch.rand(n, generator=random)
    weights /= weights.sum()
    V, c = torch.randn(CLASSES, WIDTH, generator=random), torch.randn(CLASSES, generator=random)
    x, P, w = rows.double(), p.double(), weights.double()
    along = V.double() @ x.T + c[:, None]
    shares = w * P * (along - (P * along if apart else (P * along).sum(0)))
    q = w * (P - P * P)

    monkeypatch.setattr(_entries, "MOST", 2.0)
    monkeypatch.setattr(_entries, "SAMPLE", p.numel())
    for kept, near in ((0.99999, 3e-4), *([(0.98, 0.1)] if n > CLASSES else [])):
        monkeypatch.setattr(_entries, "KEPT", kept)
        entries = Entries.of(p, weights, rows, apart=apart)
        assert entries
        hess_V, hess_c = entries.curve(V, c, torch.ones(WIDTH))
        for found, expected in (
            (hess_V, shares @ x),
            (hess_c, shares.sum(1)),
            (entries.middles(), q @ x / q.sum(1, keepdim=True)),
        ):
            assert float((found - expected).norm() / expected.norm()) < near
        np.testing.assert_allclose(
            entries.left + _spread(entries, CLASSES, weights), q.sum(1), rtol=1e-4
        )  # what is left out is known
        off = [
            float((entries.curve(V, c, spectrum)[0] - shares @ x).norm())
            for spectrum in (torch.ones(WIDTH), torch.zeros(WIDTH))
        ]
        assert kept > 0.99 or off[0] < off[1]
    monkeypatch.setattr(_entries, "MOST", 0.1)
    assert Entries.of(p, weights, rows, apart=apart) is None


def test_pairs_are_not_counted_where_a_sample_told_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    p, weights = torch.linspace(0.01, 0.02, CLASSES * 500).view(CLASSES, 500), torch.full((500,), 1 / 500)
    p[0, 0] = 0.5
    monkeypatch.setattr(_entries, "MOST", 2.0)
    for sample, told in ((p.numel(), True), (1, False)):  # one is that which counts most
        monkeypatch.setattr(_entries, "SAMPLE", sample)
        found = Entries.of(p, weights, torch.ones(500, WIDTH).bfloat16(), apart=True)
        assert (found is not None) is told


def _spread(entries: Entries, n_classes: int, weights: Tensor) -> Tensor:
    total = torch.zeros(n_classes)
    for place in range(len(entries.starts) - 1):
        some = slice(entries.starts[place], entries.starts[place + 1])
        p = torch.from_numpy(entries.p[some])
        total[place % n_classes] += (weights[entries.members[some]] * (p - p * p)).sum()
    return total


def test_records_are_kept_of_the_last_optima_alone() -> None:
    solved = Solved(Metric(torch.ones(2), torch.eye(2), torch.zeros(2)), torch.float32)
    record = Record(torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, 2), 1.0, exact=True)
    W, b = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for l2 in (1.0, 0.5, 0.25, 0.125):
        solved.add(l2, W, b, 1e9, record)
    assert [one.record is None for one in solved._all] == [True, False, False, False]
    for l2, known in ((0.1, True), (0.7, False)):
        assert (solved.start(l2)[2] is not None) is known


def test_without_numba_a_path_ends_at_the_same_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trail, "_compiled", None)
    problem, counts = problem_of(), counted(monkeypatch)
    l2s = sorted(L2_GRID, reverse=True)[::8]
    solutions = solve_path(problem, l2s)
    assert max(gap(problem, found, l2) for l2, found in zip(l2s, solutions, strict=True)) <= 1e-6
    assert "few" not in counts


def test_a_path_whose_records_do_not_fit_in_memory_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, counts = problem_of(), counted(monkeypatch)
    l2s = sorted(L2_GRID, reverse=True)[::8]
    tight = replace(problem, memory_bytes=2 * 4 * N * CLASSES)
    solutions = solve_path(tight, l2s)
    assert max(gap(problem, found, l2) for l2, found in zip(l2s, solutions, strict=True)) <= 1e-6
    assert "beside" not in counts


def test_middles_save_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many classes: a seventh at least."""
    problem, products = problem_of(), []
    made = Trail.middles
    for measured in (True, False):
        monkeypatch.setattr(Trail, "middles", made if measured else lambda self, *_: torch.zeros(1, CLASSES, WIDTH))
        with monkeypatch.context() as patch:
            counts = counted(patch)
            solve_path(problem, sorted(L2_GRID, reverse=True)[16:32])
        products.append(counts["few"] + counts["all"])
    assert products[0] < 0.86 * products[1]

"""Solver `newton`: every optimum proved in float64, with and without kept probabilities, for labels too."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from embedpipe.heads import L2_GRID, fit_linear
from embedpipe.heads._directions import Points, find_direction
from embedpipe.heads._newton import _points, _step, polish, solve_path
from embedpipe.heads._problem import Chunked, Problem, Solution, centred
from embedpipe.heads._starts import Solved
from embedpipe.heads._sweeps import Metric, Sweeps


def hard(n: int, width: int, n_classes: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features as after a ReLU, correlated; some labels wrong; a constant column, a doubled one, some scaled by 1e3."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    rank = min(width, 64)
    hidden = random.normal(size=(n, rank)) + random.normal(size=(n_classes, rank))[y]
    mixing = random.normal(size=(rank, width)) / np.arange(1, rank + 1)[:, None] ** 0.5
    X = np.maximum(hidden @ mixing + 0.3 * random.normal(size=(n, width)), 0)
    y = np.where(random.random(n) < 0.03, random.integers(n_classes, size=n), y)
    X[:, 0], X[:, 1] = 5, X[:, 2]
    X[:, 3 : width // 10 + 4] *= 1e3
    return X.astype(np.float32), y


def standardised(X: np.ndarray) -> np.ndarray:
    X = X.astype(np.float64)
    std = X.std(axis=0)
    std[std < 1e-9 * np.abs(X.mean(axis=0))] = 0
    return (X - X.mean(axis=0)) / np.maximum(std, 0.01 * np.median(std))


def gap(problem: Problem, found: Solution, l2: float) -> float:
    """Squared gradient / (2 l2) at the bias that is best for the weights, relative to the objective, written down afresh."""
    across, bias, weight = problem.X.astype(np.float64) @ found.weight.T, found.bias, problem.sample_weight[:, None]
    truth = problem.y.reshape(len(across), -1) if problem.apart else np.eye(problem.n_classes)[problem.y]
    for _ in range(20):
        logits = across + bias
        top = 0 if problem.apart else np.logaddexp.reduce(logits, axis=1)[:, None]
        p = 1 / (1 + np.exp(-logits)) if problem.apart else np.exp(logits - top)
        error = (p - truth) * weight
        hessian = np.diag((p * weight).sum(axis=0)) - (p * weight).T @ p
        curvature = np.diag((p * (1 - p) * weight).sum(axis=0)) if problem.apart else hessian
        bias = bias - np.linalg.pinv(curvature, rcond=1e-9) @ error.sum(axis=0)
    assert np.abs(error.sum(axis=0)).max() < 1e-9
    gradient = error.T @ problem.X + l2 * found.weight
    return float(np.square(gradient).sum() / (2 * l2) / problem.objective(found, l2))


def even(X: np.ndarray | Chunked, y: np.ndarray, n_classes: int, **more: int) -> Problem:
    return Problem(X, y, np.full(len(X), 1 / len(X)), n_classes, **more)


SHAPES = [(400, 60, 2), (90, 128, 2), (600, 60, 10), (120, 160, 10), (900, 40, 100)]
SINGLE = [(70_000, 64, 2), (70_000, 64, 5), (3500, 1280, 26)]  # large enough to be swept in float32
LARGE = [(n, width, c) for width in (512, 1280, 2048) for c in (2, 10, 100) for n in (300, 3 * width)]


@pytest.mark.parametrize("shape", [*SHAPES, *SINGLE, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)])
def test_nothing_is_left_to_gain_at_any_point_of_a_path(shape: tuple[int, int, int]) -> None:
    X, y = hard(*shape)
    problem = even(standardised(X).astype(np.float32), y, shape[2])
    l2s = sorted(L2_GRID, reverse=True)
    gaps = [gap(problem, found, l2) for l2, found in zip(l2s, solve_path(problem, l2s), strict=True)]
    assert max(gaps) <= 1e-6


def test_products_in_bfloat16_lead_to_the_same_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every processor, though only some gain by it; weights differ by less than what ends the minimisation."""
    X, y = hard(30_000, 150, 3)
    problem, l2s = even(standardised(X).astype(np.float32), y, 3), sorted(L2_GRID, reverse=True)[::4]
    paths, have = [], []
    made = Sweeps.shorten

    def shorten(self: Sweeps, metric: Metric, least: float, *, turned: bool) -> None:
        made(self, metric, least, turned=turned)
        have.append(self._turned is not None)

    monkeypatch.setattr(Sweeps, "shorten", shorten)
    for known in (True, False):
        monkeypatch.setattr("embedpipe.heads._sweeps.has_bfloat16", lambda known=known: known)
        paths.append(solve_path(problem, l2s))
        assert max(gap(problem, one, l2) for one, l2 in zip(paths[-1], l2s, strict=True)) <= 1e-6
    assert have == [True, False]
    for one, other in zip(*paths, strict=True):
        np.testing.assert_allclose(one.weight, other.weight, atol=2e-3 * np.abs(one.weight).max())


@pytest.mark.parametrize("l2", [1e-3, 1e-6])
def test_one_l2_in_bfloat16_leads_to_the_same_optimum(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once or as they are read, rows are the same; where rounding would be seen, it is not used."""
    X, y = hard(30_000, 150, 3)
    Z = standardised(X).astype(np.float32)
    found = []
    for known, features in ((True, Z), (True, Chunked(Z.shape, lambda rows: Z[rows])), (False, Z)):
        monkeypatch.setattr("embedpipe.heads._sweeps.has_bfloat16", lambda known=known: known)
        problem = even(features, y, 3)
        [solution] = solve_path(problem, [l2])
        assert gap(even(Z, y, 3), solution, l2) <= 1e-6
        found.append(polish(problem, solution, l2))
    most = np.abs(found[0].weight).max()
    np.testing.assert_allclose(found[0].weight, found[1].weight, atol=1e-3 * most)
    np.testing.assert_allclose(found[0].weight, found[2].weight, atol=1e-5 * most)


@pytest.mark.parametrize("n_classes", [2, 4, 30])
def test_one_l2_in_bfloat16_needs_no_memory_for_probabilities(n_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedpipe.heads._sweeps.has_bfloat16", lambda: True)
    X, y = hard(45_000, 100, n_classes)
    problem = even(standardised(X).astype(np.float32), y, n_classes, memory_bytes=10**6)
    [found] = solve_path(problem, [1e-3])
    assert gap(problem, found, 1e-3) <= 1e-6


@pytest.mark.parametrize("seed", [23, 137, 186, 231])
def test_what_weights_feel_of_a_bias_is_counted(seed: int) -> None:
    """Of classes and labels that are rare, with weights of many sizes, on few rows."""
    random = np.random.default_rng(seed)
    c, width = int(random.integers(2, 24)), int(random.integers(2, 60))
    n = int(random.integers(max(2 * c, 60), 700))
    y = random.choice(c, n, p=random.dirichlet(np.full(c, 10 ** random.uniform(-2, 0))))
    y[:c] = np.arange(c)
    X = random.normal(size=(n, width)) + random.uniform(0, 2) * random.normal(size=(c, width))[y]
    X = np.maximum(X, 0) if random.random() < 0.3 else X
    X = X**3 if random.random() < 0.3 else X
    weights = 10 ** random.uniform(-random.uniform(0, 10), 0, n) if random.random() < 0.5 else np.ones(n)
    if random.random() < 0.25:
        y = (random.random((n, c)) < 10 ** random.uniform(-2, -0.3)).astype(np.int64)
        y[0], y[1] = 1, 0
    problem = Problem(standardised(X).astype(np.float32), y, weights / weights.sum(), c)
    l2s = sorted(L2_GRID, reverse=True)
    assert max(gap(problem, found, l2) for found, l2 in zip(solve_path(problem, l2s), l2s, strict=True)) <= 1e-6


@pytest.mark.parametrize("l2s", [sorted(L2_GRID, reverse=True)[::4], [1e-5]])
def test_logits_that_float32_cannot_raise_e_to_are_no_optimum(l2s: list[float]) -> None:
    """Of one row far away, with the wrong label; an infinite loss is nothing to be content with."""
    random, y = np.random.default_rng(0), np.arange(70_000) % 2
    X = random.normal(size=(70_000, 64)) + 1.2 * random.normal(size=(2, 64))[y]
    X[7] *= 60
    y[7] = 1 - y[7]
    problem = even(standardised(X).astype(np.float32), y, 2)
    assert max(gap(problem, found, l2) for found, l2 in zip(solve_path(problem, l2s), l2s, strict=True)) <= 1e-6


@pytest.mark.parametrize("n_classes", [2, 3, 30])
@pytest.mark.parametrize("chunked", [False, True])
def test_rows_far_from_zero_are_solved_around_their_middle(n_classes: int, chunked: bool) -> None:
    X, y = hard(600, 40, n_classes)
    Z, l2s = standardised(X).astype(np.float32), sorted(L2_GRID, reverse=True)[::4]
    Z[:, :2] += 100, -50
    Z += 10
    features = Chunked(Z.shape, lambda rows: Z[rows]) if chunked else Z
    found = solve_path(even(features, y, n_classes), l2s)
    middle = Z.mean(axis=0, dtype=np.float64)
    around = even(Z - middle, y, n_classes)
    for one, l2 in zip(found, l2s, strict=True):
        assert gap(around, Solution(one.weight, one.bias + one.weight @ middle), l2) <= 1e-6
    [again] = solve_path(even(features, y, n_classes), l2s[-1:], found[-1])
    np.testing.assert_allclose(again.weight, found[-1].weight, atol=1e-6 * np.abs(again.weight).max())
    np.testing.assert_allclose(again.bias, found[-1].bias, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e6, 1e8])
def test_a_feature_beyond_all_others_is_solved_or_told(scale: float) -> None:
    """Rounding may hide the others from it; never is the answer no number."""
    random, y = np.random.default_rng(0), np.arange(800) % 10
    X = random.normal(size=(800, 40)) + random.normal(size=(10, 40))[y]
    X[:, 0] *= scale
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = solve_path(even(X.astype(np.float32), y, 10), sorted(L2_GRID, reverse=True))
    assert all("newton has not converged" in str(one.message) for one in told)
    assert bool(told) == (scale > 1e6)
    assert all(np.isfinite(one.weight).all() and np.isfinite(one.bias).all() for one in found)


def test_a_direction_beyond_all_numbers_moves_nothing() -> None:
    X, y = hard(200, 20, 3)
    sweeps, l2 = Sweeps(even(standardised(X), y, 3)), torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    W, b = torch.zeros(2, 3, 20, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    points = _points(sweeps, l2, W, b)
    lengths = torch.tensor([1e308, 1e-3], dtype=torch.float64)
    dW = -points.grad_W / points.grad_W.abs().amax((1, 2), keepdim=True) * lengths[:, None, None]
    found, moved = _step(sweeps, points, dW * torch.tensor([10.0, 1.0])[:, None, None], 0 * b, torch.clone, 4e-7)
    assert moved
    assert torch.equal(found.W[0], points.W[0])
    assert found.objective[1] < points.objective[1]


def test_rounding_of_a_point_far_off_stops_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 may have found its objective a thousandth too low."""
    monkeypatch.setattr("embedpipe.heads._sweeps.has_bfloat16", lambda: True)
    X, y = hard(45_000, 100, 3)
    sweeps, l2 = Sweeps(even(standardised(X).astype(np.float32), y, 3)), torch.tensor([1e-3], dtype=torch.float64)
    sweeps.shorten(sweeps.measure(), 1e-3, turned=False)
    W, b = torch.zeros(1, 3, 100, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for far in (True, False):
        points = _points(sweeps, l2, W, b, far=far)
        low = replace(points, objective=points.objective * 0.999)
        _, moved = _step(sweeps, low, -1e-6 * points.grad_W, 0 * b, torch.clone, 4e-7)
        assert moved is far


def test_what_is_no_number_is_no_optimum() -> None:
    nothing = torch.zeros(3, dtype=torch.float64)
    objective = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    weights, biases = nothing.view(3, 1, 1), nothing.view(3, 1)
    points = Points(nothing + 1, weights, biases, objective, weights, biases, biases + 1, biases, nothing)
    assert points.gap.tolist() == [0.0, torch.inf, torch.inf]


def test_a_gradient_whose_square_is_nothing_gives_no_direction() -> None:
    X, y = hard(200, 20, 3)
    sweeps, l2 = Sweeps(even(standardised(X), y, 3)), torch.tensor([1e-3], dtype=torch.float64)
    W, b = torch.ones(1, 3, 20, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    points = replace(_points(sweeps, l2, W, b), grad_W=1e-200 * W, grad_b=b)
    dW, db, _ = find_direction(sweeps, points, torch.arange(1), sweeps.measure(), tolerance=4e-7)
    assert torch.equal(dW, 0 * W)
    assert torch.equal(db, b)


@pytest.mark.parametrize(("l2", "n_classes"), [(1e-28, 2), (1e-28, 3), (1e-28, 30), (1e-300, 3)])
def test_a_penalty_that_rounding_hides_is_told(l2: float, n_classes: int) -> None:
    random = np.random.default_rng(0)
    with pytest.warns(RuntimeWarning, match="newton has not converged"):
        [found] = solve_path(
            even(random.normal(size=(60, 20)).astype(np.float32), np.arange(60) % n_classes, n_classes), [l2]
        )
    assert np.isfinite(found.weight).all()
    assert np.isfinite(found.bias).all()


def test_where_bfloat16_does_not_do_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On features of few directions, for one small l2 of many classes."""
    monkeypatch.setattr("embedpipe.heads._sweeps.has_bfloat16", lambda: True)
    random, y = np.random.default_rng(0), np.arange(20_000) % 30
    hidden = random.normal(size=(20_000, 64)) + 2 * random.normal(size=(30, 64))[y]
    y = np.where(random.random(20_000) < 0.03, random.integers(30, size=20_000), y)
    problem = even(standardised(hidden @ random.normal(size=(64, 256))).astype(np.float32), y, 30)
    [found] = solve_path(problem, [1e-6])
    assert gap(problem, found, 1e-6) <= 1e-6


def test_a_start_from_afar_is_left() -> None:
    X, y = hard(90_000, 50, 3)
    problem = even(standardised(X).astype(np.float32), y, 3)
    for far in (1e4, np.nan):
        start = Solution(far * np.random.default_rng(0).normal(size=(3, 50)), np.zeros(3))
        [found] = solve_path(problem, [1e-3], start)
        assert gap(problem, found, 1e-3) <= 1e-6


def test_a_copy_around_the_middle_is_made_where_memory_holds_it() -> None:
    X, y = hard(500, 30, 3)
    for memory, kind in ((2**20, np.ndarray), (1000, Chunked)):
        around, middle = centred(even(X + np.float32(1e3), y, 3, memory_bytes=memory))
        assert isinstance(around.X, kind)
        np.testing.assert_allclose(around.X[:7], X[:7] + 1e3 - middle, atol=1e-3)


@pytest.mark.parametrize("n_classes", [4, 26])
def test_l2_that_are_nearly_the_same_are_as_good_as_one(n_classes: int) -> None:
    X, y = hard(500, 20, n_classes)
    problem = even(standardised(X).astype(np.float32), y, n_classes)
    l2s = [1e-2, 1e-3, 1e-3 * (1 - 1e-12), float(np.nextafter(1e-3, 0)), 1e-3 * (1 - 1e-9), 1e-4]
    l2s.sort(reverse=True)
    assert max(gap(problem, found, l2) for found, l2 in zip(solve_path(problem, l2s), l2s, strict=True)) <= 1e-6


def test_a_class_of_next_to_no_weight_has_a_bias() -> None:
    y, weights = np.ones(100_000, np.int64), np.full(100_000, 1.0)
    y[0], weights[0] = 0, 2e-12
    problem = Problem(np.zeros((100_000, 1), np.float32), y, weights / weights.sum(), 2)
    np.testing.assert_allclose(problem.blind.bias, np.log(99_999 / 2e-12))


def test_the_hessians_of_single_classes_save_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the span of the weights: a quarter at least of what is left with their middles, on classes that overlap."""
    random = np.random.default_rng(0)
    y = random.integers(6, size=6000)
    X = (0.2 * random.normal(size=(6, 100))[y] + random.normal(size=(6000, 100))) * np.logspace(0, -2, 100)
    problem, products = even(standardised(X).astype(np.float32), y, 6), []
    made = Sweeps.curve

    def curve(self: Sweeps, V: Tensor, c: Tensor, which: Tensor, metric: Metric, **more: bool) -> tuple[Tensor, Tensor]:
        products[-1] += 1
        return made(self, V, c, which, metric, **more)

    monkeypatch.setattr(Sweeps, "curve", curve)
    for most in (0, 32):
        monkeypatch.setattr("embedpipe.heads._directions.MANY_CLASSES", most)
        products.append(0)
        solve_path(problem, [1e-4])
    assert products[1] < 0.75 * products[0]


@pytest.mark.parametrize(("n_classes", "values", "curves"), [(10, 140, 600), (30, 130, 1450)])
def test_a_path_costs_few_sweeps(n_classes: int, values: int, curves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few classes are solved together, many one after the other; starts lie on curves through the neighbours."""
    X, y = hard(3000, 60, n_classes)
    problem, sweeps = even(standardised(X).astype(np.float32), y, n_classes), _counted(monkeypatch)
    solve_path(problem, sorted(L2_GRID, reverse=True))
    assert sweeps["value"] < values
    assert sweeps["curve"] < curves


def _counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count problems, not calls."""
    counts = {"value": 0, "curve": 0}

    def count(name: str) -> None:
        made = getattr(Sweeps, name)

        def counting(self: Sweeps, W: Tensor, *rest: Any, **more: Any) -> Any:
            counts[name] += len(W)
            return made(self, W, *rest, **more)

        monkeypatch.setattr(Sweeps, name, counting)

    count("value")
    count("curve")
    return counts


def test_many_classes_come_down_to_a_small_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer sweeps than from nothing, to the same optimum."""
    X, y = hard(2000, 120, 30)
    problem, sweeps, solutions, counts = even(standardised(X), y, 30), _counted(monkeypatch), [], []
    for steep in (1e-4, 0.0):
        monkeypatch.setattr("embedpipe.heads._newton.STEEP", steep)
        sweeps.update(value=0, curve=0)
        solutions += solve_path(problem, [1e-7])
        counts.append(sweeps["value"] + sweeps["curve"])
    assert counts[0] < 0.8 * counts[1]
    assert max(gap(problem, one, 1e-7) for one in solutions) <= 1e-6


def test_starts_lie_on_a_curve_in_log_l2() -> None:
    solved = Solved(Metric(torch.ones(1), torch.eye(1), torch.zeros(1)), torch.float64)
    for l2 in torch.logspace(0, -4, 9, dtype=torch.float64):
        solved.add(float(l2), (l2.log() ** 3).reshape(1, 1), (l2.log() ** 2).reshape(1), 1e9)  # the penalty is small
    for l2, found in ((10**-2.25, solved.start(10**-2.25)), (10**-4.5, solved.start(10**-4.5))):
        np.testing.assert_allclose(found[1].item(), math.log(l2) ** 2)  # beyond the last through three
    np.testing.assert_allclose(solved.start(10**-2.25)[0].item(), math.log(10**-2.25) ** 3)
    assert solved.start(1e-9)[1].item() == pytest.approx(math.log(1e-4) ** 2)  # too far for a curve


def test_starts_of_a_large_penalty_lie_where_least_squares_would_have_them() -> None:
    """There exactly; of classes, where p (1 - p) changes, far nearer than a polynomial through the weights."""
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    spectrum, spread, c = torch.logspace(0, -3, 5, dtype=torch.float64), 0.25, torch.arange(5.0, dtype=torch.float64)

    def ridge(l2: float) -> Tensor:
        return ((c / (spectrum + l2 / spread)) @ basis.T)[None]

    solved = Solved(Metric(spectrum, basis, torch.zeros(5)), torch.float64)
    for l2 in (100.0, 10.0):
        solved.add(l2, ridge(l2), torch.zeros(1), spread)
    for l2 in (30.0, 1.0):
        np.testing.assert_allclose(solved.start(l2)[0][0], ridge(l2), rtol=1e-12)


def test_polishing_ends_where_rounding_hides_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = hard(70_000, 64, 3)
    problem = even(standardised(X).astype(np.float32), y, 3)
    [solution] = solve_path(problem, [1e-6])
    sweeps = _counted(monkeypatch)
    monkeypatch.delattr(Sweeps, "measure")  # what the path measured is still known
    polished = polish(problem, solution, 1e-6)
    assert gap(problem, polished, 1e-6) <= gap(problem, solution, 1e-6)
    assert sweeps["curve"] <= 45


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_head_is_as_good_and_answers_as_scikit_learn_does(shape: tuple[int, int, int]) -> None:
    X, y = hard(*shape)
    Z = standardised(X)
    problem = even(Z, y, shape[2])
    for l2 in (1e-5, 1e-2):
        head = fit_linear(X, y, classes=[str(c) for c in range(shape[2])], l2=l2)
        assert head.provenance["solver"] == "newton"
        model = LogisticRegression(C=1 / (len(y) * l2), tol=1e-8, max_iter=20_000).fit(Z, y)
        same = head.predict_proba(X).argmax(axis=1) == model.predict(Z)
        assert same.mean() >= 0.999
        best = problem.objective(Solution(model.coef_, model.intercept_), l2)
        assert head.provenance["objective"] <= best * (1 + 1e-6)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_probabilities_that_do_not_fit_in_memory_change_nothing(n_classes: int) -> None:
    X, y = hard(500, 40, n_classes)
    Z, l2s = standardised(X).astype(np.float32), sorted(L2_GRID, reverse=True)
    kept = solve_path(even(Z, y, n_classes), l2s)
    again = solve_path(even(Z, y, n_classes, memory_bytes=1), l2s)
    for one, other in zip(
        kept, again, strict=True
    ):  # batches of 12 and of 1: both optima within what ends a minimisation
        np.testing.assert_allclose(one.weight, other.weight, atol=1e-2 * np.abs(one.weight).max())


def test_features_that_are_read_in_chunks_give_the_same_weights() -> None:
    X, y = hard(60_000, 80, 4)  # more than what is carried in float64
    Z = standardised(X).astype(np.float32)
    most = 0

    def read(rows: object) -> np.ndarray:
        nonlocal most
        part = Z[rows]  # type: ignore[index]
        most = max(most, len(part))
        return part

    for l2 in (1e-1, 1e-3):
        problems = even(Z, y, 4), even(Chunked(Z.shape, read), y, 4)
        whole, chunked = (polish(one, solve_path(one, [l2])[0], l2) for one in problems)
        np.testing.assert_allclose(whole.weight, chunked.weight, atol=1e-5)
    assert most <= 4096


def test_labels_of_which_an_image_may_have_several_are_solved_one_by_one() -> None:
    X, first = hard(300, 30, 2)
    second = (np.arange(300) // 3) % 2
    Z = standardised(X).astype(np.float32)
    [found] = solve_path(even(Z, np.stack([first, second], axis=1), 2), [1e-2])
    for number, y in enumerate((first, second)):
        [alone] = solve_path(even(Z, y, 2), [1e-2])
        np.testing.assert_allclose(found.weight[number], alone.weight[0], atol=5e-3)
    problem = even(Z, np.stack([first, second], axis=1), 2)
    assert gap(problem, found, 1e-2) <= 1e-6


def test_what_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedpipe.heads import _newton

    monkeypatch.setattr(_newton, "STEPS", 1)
    X, y = hard(200, 20, 3)
    with pytest.warns(RuntimeWarning) as caught:
        solve_path(even(standardised(X), y, 3), [1e-6])
    assert "newton has not converged at l2 = 1e-06" in str(caught[-1].message)

"""Solver `newton`: the optimality gap of every solution, computed in float64, for classes and labels, in every precision."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from embedpipe.heads import L2_GRID, ChunkedFeatures, fit_linear
from embedpipe.heads._batched_objective import BatchedObjective, Iterates
from embedpipe.heads._conjugate_gradients import MAX_PRODUCTS, newton_direction
from embedpipe.heads._newton import line_search, make_solver, minimise, solve
from embedpipe.heads._optima import Optima, extrapolate
from embedpipe.heads._problem import Problem, centre_features
from embedpipe.heads._threads import row_threads

GRID = sorted(L2_GRID, reverse=True)


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


def gap(problem: Problem, weight: np.ndarray, bias: np.ndarray, l2: float) -> float:
    """Squared gradient / (2 l2) at the bias that is optimal for the weights, relative to the objective; independent code."""
    X = problem.X[:].astype(np.float64)
    across, sample_weight = X @ weight.T, problem.sample_weight[:, None]
    truth = problem.y.reshape(len(across), -1) if problem.independent else np.eye(problem.n_classes)[problem.y]
    for _ in range(20):
        logits = across + bias
        top = 0 if problem.independent else np.logaddexp.reduce(logits, axis=1)[:, None]
        p = 1 / (1 + np.exp(-logits)) if problem.independent else np.exp(logits - top)
        error = (p - truth) * sample_weight
        if np.abs(error.sum(axis=0)).max() < 1e-12:
            break
        hessian = np.diag((p * sample_weight).sum(axis=0)) - (p * sample_weight).T @ p
        curvature = np.diag((p * (1 - p) * sample_weight).sum(axis=0)) if problem.independent else hessian
        bias = bias - np.linalg.pinv(curvature, rcond=1e-9) @ error.sum(axis=0)
    assert np.abs(error.sum(axis=0)).max() < 1e-9
    gradient = error.T @ X + l2 * weight
    return float(np.square(gradient).sum() / (2 * l2) / problem.objective(weight, bias, l2))


def even(X: np.ndarray | ChunkedFeatures, y: np.ndarray, n_classes: int, **more: int) -> Problem:
    return Problem(X, y, np.full(len(X), 1 / len(X)), n_classes, **more)


def hard_problem(n: int, width: int, n_classes: int, *, labels: bool = False, **more: int) -> Problem:
    X, y = hard(n, width, n_classes)
    if labels:
        one_hot = np.eye(n_classes, dtype=np.int64)
        y = one_hot[y] | one_hot[(y * 7) % n_classes]
    return even(standardised(X).astype(np.float32), y, n_classes, **more)


def path(
    problem: Problem, l2s: list[float], objective: BatchedObjective | None = None, tolerance: float = 4e-7
) -> tuple[np.ndarray, np.ndarray]:
    """The weights (L, K, D) and biases (L, K) of a path."""
    optima = Optima(problem, partial(solve, objective) if objective else make_solver(problem))
    optima.find(l2s, tolerance)
    weights, biases, _ = zip(*(optima.found[l2] for l2 in l2s), strict=True)
    return np.stack(weights), np.stack(biases)


def start(problem: Problem) -> tuple[Tensor, Tensor]:
    weight, bias = problem.start
    return torch.from_numpy(weight)[None], torch.from_numpy(bias)[None]


def worst_gap(problem: Problem, l2s: list[float], objective: BatchedObjective | None = None) -> float:
    """The largest gap on a path."""
    weights, biases = path(problem, l2s, objective)
    return max(gap(problem, weight, bias, l2) for weight, bias, l2 in zip(weights, biases, l2s, strict=True))


class CountedObjective(BatchedObjective):
    """Counts evaluated problems, and problems of Hessian-vector products."""

    values = products = 0

    def evaluate(self, l2: Tensor, W: Tensor, b: Tensor) -> Iterates:
        self.values += len(W)
        return super().evaluate(l2, W, b)

    def hessian_product(self, at: Iterates, V: Tensor, c: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        self.products += len(V)
        return super().hessian_product(at, V, c, **options)


SHAPES = [(400, 60, 2), (90, 128, 2), (600, 60, 10), (120, 160, 10), (300, 30, 60)]
SINGLE = [(70_000, 64, 2), (20_000, 64, 5), (3000, 200, 26)]  # in float32
LARGE = [(n, width, c) for width in (512, 1280, 2048) for c in (2, 10, 100) for n in (300, 3 * width)]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(shape, marks=SLOW) for shape in [(900, 40, 100), *LARGE])])
def test_every_point_of_a_path_is_an_optimum(shape: tuple[int, int, int]) -> None:
    assert worst_gap(hard_problem(*shape), GRID) <= 1e-6


@pytest.mark.parametrize(
    "shape", [*SINGLE, *(pytest.param(shape, marks=SLOW) for shape in [(70_000, 64, 5), (3500, 1280, 26)])]
)
def test_every_point_of_a_path_in_float32_is_an_optimum(shape: tuple[int, int, int]) -> None:
    problem = hard_problem(*shape)
    objective = BatchedObjective(problem, float64_size=0)
    assert objective.dtype == torch.float32
    assert worst_gap(problem, GRID, objective) <= 1e-6


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("n_classes", [24, pytest.param(40, marks=SLOW)])
def test_every_point_of_a_path_of_many_classes_or_labels_is_an_optimum(n_classes: int, labels: bool) -> None:
    problem = hard_problem(1000, 48, n_classes, labels=labels)
    objective = BatchedObjective(problem, float64_size=0)
    assert worst_gap(problem, GRID[::4], objective) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("n_classes", [24, 40])
def test_every_point_of_a_large_path_of_many_classes_or_labels_is_an_optimum(n_classes: int, labels: bool) -> None:
    assert worst_gap(hard_problem(17_000, 256, n_classes, labels=labels), GRID) <= 1e-6


def some_iterates(objective: BatchedObjective, l2: float) -> Iterates:
    W, b = start(objective.problem)
    random = torch.Generator().manual_seed(0)
    W = W + 0.1 * torch.randn(W.shape, dtype=torch.float64, generator=random)
    return objective.evaluate(torch.tensor([l2], dtype=torch.float64), W, b)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("memory", [2**30, 1])
def test_gradient_and_hessian_are_those_of_finite_differences(labels: bool, memory: int) -> None:
    """With stored probabilities, and with those that are computed again."""
    objective = BatchedObjective(hard_problem(200, 20, 4, labels=labels, memory_bytes=memory))
    at = some_iterates(objective, 1e-2)
    assert (at.probabilities is None) is (memory == 1)
    V, c = (
        torch.randn(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for part in (at.W, at.b)
    )
    up, down = (objective.evaluate(at.l2, at.W + step * V, at.b + step * c) for step in (1e-5, -1e-5))
    slope = (at.grad_W * V).sum() + (at.grad_b * c).sum()
    assert float((up.objective - down.objective) / 2e-5) == pytest.approx(float(slope), rel=1e-6)
    hess_W, hess_b = objective.hessian_product(at, V, c)
    np.testing.assert_allclose(hess_W, (up.grad_W - down.grad_W) / 2e-5, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(hess_b, (up.grad_b - down.grad_b) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", [23, 137, 186, 231])
def test_the_gap_counts_what_a_bias_gradient_does_to_the_weights(seed: int) -> None:
    """With rare classes and labels, weights of many sizes, and few rows."""
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
    assert worst_gap(Problem(standardised(X).astype(np.float32), y, weights / weights.sum(), c), GRID) <= 1e-6


@pytest.mark.parametrize("l2s", [GRID[::4], [1e-5]])
def test_logits_that_overflow_float32_are_no_optimum(l2s: list[float]) -> None:
    """One distant row has the wrong label: its loss may become infinite."""
    random, y = np.random.default_rng(0), np.arange(70_000) % 2
    X = random.normal(size=(70_000, 64)) + 1.2 * random.normal(size=(2, 64))[y]
    X[7] *= 60
    y[7] = 1 - y[7]
    assert worst_gap(even(standardised(X).astype(np.float32), y, 2), l2s) <= 1e-6


@pytest.mark.parametrize("n_classes", [2, 3, 30])
@pytest.mark.parametrize("chunked", [False, True])
def test_features_far_from_zero_are_centred(n_classes: int, chunked: bool) -> None:
    X, y = hard(600, 40, n_classes)
    Z, l2s = standardised(X).astype(np.float32), GRID[::4]
    Z[:, :2] += 100, -50
    Z += 10
    problem = even(ChunkedFeatures(Z.shape, lambda rows: Z[rows]) if chunked else Z, y, n_classes)
    weights, biases = path(problem, l2s)
    mean = Z.mean(axis=0, dtype=np.float64)
    centred = even(Z - mean, y, n_classes)
    for weight, bias, l2 in zip(weights, biases, l2s, strict=True):
        assert gap(centred, weight, bias + weight @ mean, l2) <= 1e-6
    [weight], [bias] = path(problem, l2s[-1:], tolerance=1e-13)
    assert gap(centred, weight, bias + weight @ mean, l2s[-1]) <= 1e-9


@pytest.mark.parametrize("scale", [1e5, 1e8])
def test_a_feature_far_larger_than_all_others_is_solved_or_reported(scale: float) -> None:
    """Rounding may hide the others; the solution is finite in any case."""
    random, y = np.random.default_rng(0), np.arange(800) % 10
    X = random.normal(size=(800, 40)) + random.normal(size=(10, 40))[y]
    X[:, 0] *= scale
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights, biases = path(even(X.astype(np.float32), y, 10), GRID)
    assert all("newton has not converged" in str(one.message) for one in caught)
    assert bool(caught) == (scale > 1e5)
    assert np.isfinite(weights).all()
    assert np.isfinite(biases).all()


def test_an_infinite_direction_moves_nothing() -> None:
    objective = BatchedObjective(hard_problem(200, 20, 3))
    l2 = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    W, b = torch.zeros(2, 3, 20, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    at = objective.evaluate(l2, W, b)
    lengths = torch.tensor([1e308, 1e-3], dtype=torch.float64)
    dW = -at.grad_W / at.grad_W.abs().amax((1, 2), keepdim=True) * lengths[:, None, None]
    dW *= torch.tensor([10.0, 1.0])[:, None, None]
    new, moved = line_search(objective, at, (dW, 0 * b), torch.clone, 4e-7)
    assert moved
    assert torch.equal(new.W[0], at.W[0])
    assert new.objective[1] < at.objective[1]


def test_an_objective_that_is_not_finite_is_no_optimum() -> None:
    objective = BatchedObjective(hard_problem(200, 20, 3))
    at = some_iterates(objective, 1e-3)[torch.tensor([0, 0, 0])]
    broken = replace(
        at, objective=torch.tensor([1.0, torch.inf, torch.nan]), grad_W=0 * at.grad_W, grad_b=0 * at.grad_b
    )
    assert broken.gap.tolist() == [0.0, torch.inf, torch.inf]


def test_a_gradient_whose_square_underflows_gives_no_direction() -> None:
    objective = BatchedObjective(hard_problem(200, 20, 3))
    W, b = torch.ones(1, 3, 20, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    at = objective.evaluate(torch.tensor([1e-3], dtype=torch.float64), W, b)
    dW, db = newton_direction(objective, replace(at, grad_W=1e-200 * W, grad_b=b), tolerance=4e-7)
    assert torch.equal(dW, 0 * W)
    assert torch.equal(db, b)


@pytest.mark.parametrize(("l2", "n_classes"), [(1e-28, 2), (1e-28, 3), (1e-28, 30), (1e-300, 3)])
def test_a_penalty_below_the_rounding_error_is_reported(l2: float, n_classes: int) -> None:
    X, y = np.random.default_rng(0).normal(size=(60, 20)).astype(np.float32), np.arange(60) % n_classes
    with pytest.warns(RuntimeWarning, match="newton has not converged"):
        weights, biases = path(even(X, y, n_classes), [l2])
    assert np.isfinite(weights).all()
    assert np.isfinite(biases).all()


def test_a_centred_copy_is_made_if_it_fits_in_memory() -> None:
    X, y = hard(500, 30, 3)
    for memory, kind in ((2**20, np.ndarray), (1000, ChunkedFeatures)):
        centred, mean = centre_features(even(X + np.float32(1e3), y, 3, memory_bytes=memory))
        assert isinstance(centred.X, kind)
        np.testing.assert_allclose(centred.X[:7], X[:7] + 1e3 - mean, atol=1e-3)


@pytest.mark.parametrize("n_classes", [4, 26])
def test_nearly_equal_l2_are_solved(n_classes: int) -> None:
    l2s = [1e-2, 1e-3, 1e-3 * (1 - 1e-12), float(np.nextafter(1e-3, 0)), 1e-3 * (1 - 1e-9), 1e-4]
    assert worst_gap(hard_problem(500, 20, n_classes), sorted(l2s, reverse=True)) <= 1e-6


def test_a_class_of_negligible_weight_has_a_finite_bias() -> None:
    y, weights = np.ones(100_000, np.int64), np.full(100_000, 1.0)
    y[0], weights[0] = 0, 2e-12
    problem = Problem(np.zeros((100_000, 1), np.float32), y, weights / weights.sum(), 2)
    np.testing.assert_allclose(problem.start[1], np.log(99_999 / 2e-12))


def test_the_corrected_preconditioner_saves_products() -> None:
    """A quarter at least, with classes that overlap."""
    random = np.random.default_rng(0)
    y = random.integers(6, size=6000)
    X = (0.2 * random.normal(size=(6, 100))[y] + random.normal(size=(6000, 100))) * np.logspace(0, -2, 100)
    problem, products = even(standardised(X).astype(np.float32), y, 6), []
    for is_corrected in (False, True):
        objective = CountedObjective(problem)
        objective.is_corrected = is_corrected
        path(problem, [1e-4], objective)
        products.append(objective.products)
    assert products[1] < 0.75 * products[0]


@pytest.mark.parametrize(("n_classes", "values", "products"), [(10, 140, 800), (30, 130, 1800)])
def test_a_path_costs_few_products(n_classes: int, values: int, products: int) -> None:
    """A few classes are solved for several l2 together, many for one after the other, from extrapolated starts."""
    problem = hard_problem(3000, 60, n_classes)
    objective = CountedObjective(problem)
    path(problem, GRID, objective)
    assert objective.values < values
    assert objective.products < products


def test_many_classes_reach_a_small_l2_through_larger_ones() -> None:
    """With fewer products than directly, to the same optimum."""
    problem = hard_problem(1000, 60, 30)
    through, directly = CountedObjective(problem), CountedObjective(problem)
    at = minimise(directly, [1e-7], *start(problem))
    for weights, biases in (path(problem, [1e-7], through), directly.leave(at.W, at.b)):
        assert gap(problem, weights[0], biases[0], 1e-7) <= 1e-6
    assert through.values + through.products < 0.8 * (directly.values + directly.products)


def test_starts_lie_on_a_polynomial_in_log_l2() -> None:
    def optimum(l2: float) -> tuple[np.ndarray, np.ndarray, float]:
        log = math.log(l2)
        return np.full((1, 1), log**2), np.full(1, log), 0.0

    optima = {l2: optimum(l2) for l2 in np.logspace(0, -4, 9).tolist()}
    inside, beyond, distant = (extrapolate(l2, optima) for l2 in (10**-2.25, 10**-4.5, 1e-9))
    assert inside[0].item() == pytest.approx(math.log(10**-2.25) ** 2)
    assert inside[1].item() == pytest.approx(math.log(10**-2.25))
    assert beyond[0].item() == pytest.approx(math.log(10**-4.5) ** 2)  # through the last three
    assert distant[1].item() == pytest.approx(math.log(1e-4))  # the last one
    assert extrapolate(1e-2 * (1 + 1e-9), optima)[0].item() == pytest.approx(math.log(1e-2) ** 2)


def test_a_tolerance_below_the_rounding_error_ends_at_that_error() -> None:
    problem = hard_problem(20_000, 64, 3)
    objectives = [CountedObjective(problem, float64_size=0) for _ in range(2)]
    gaps = [
        gap(problem, *(part[0] for part in path(problem, [1e-6], objective, tolerance)), 1e-6)
        for objective, tolerance in zip(objectives, (4e-7, 1e-20), strict=True)
    ]
    assert gaps[1] <= gaps[0]
    assert objectives[1].products <= objectives[0].products + 3 * MAX_PRODUCTS


def test_exact_weights_do_not_depend_on_the_path() -> None:
    problem = hard_problem(600, 60, 10)
    exact = []
    for l2s in ([1e-2], [10.0, 1e-2], [*GRID[:20], 1e-2]):
        optima = Optima(problem, make_solver(problem))
        optima.find(l2s)
        optima.find([1e-2], 1e-12)
        exact.append(optima.found[1e-2][0])
    for weight in exact[1:]:
        np.testing.assert_allclose(weight, exact[0], atol=1e-6 * np.abs(weight).max())


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    problem, before = hard_problem(20_000, 64, 3), torch.get_num_threads()
    weights = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with row_threads() as pool:
                assert (pool is None) is (threads == 1)
                assert torch.get_num_threads() == 1
                weights.append(path(problem, [1e-3], BatchedObjective(problem, pool, float64_size=0))[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_head_is_as_good_as_that_of_scikit_learn_and_predicts_the_same(shape: tuple[int, int, int]) -> None:
    X, y = hard(*shape)
    Z = standardised(X)
    problem = even(Z, y, shape[2])
    for l2 in (1e-5, 1e-2):
        head = fit_linear(X, y, classes=[str(c) for c in range(shape[2])], l2=l2)
        assert head.provenance["solver"] == "newton"
        model = LogisticRegression(C=1 / (len(y) * l2), tol=1e-8, max_iter=20_000).fit(Z, y)
        same = head.predict_proba(X).argmax(axis=1) == model.predict(Z)
        assert same.mean() >= 0.999
        best = problem.objective(model.coef_, model.intercept_, l2)
        assert head.provenance["objective"] <= best * (1 + 1e-6)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_probabilities_that_do_not_fit_in_memory_change_nothing(n_classes: int) -> None:
    """Both optima are within the tolerance."""
    stored, again = (path(hard_problem(500, 40, n_classes, memory_bytes=memory), GRID)[0] for memory in (2**30, 1))
    for one, other in zip(stored, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2 * np.abs(one).max())


def test_features_that_are_read_in_chunks_give_the_same_weights() -> None:
    problem = hard_problem(20_000, 80, 4)
    most = 0

    def read(rows: Any) -> np.ndarray:
        nonlocal most
        part = problem.X[rows]
        most = max(most, len(part))
        return part

    chunked = replace(problem, X=ChunkedFeatures(problem.X.shape, read))
    for l2 in (1e-1, 1e-3):
        exact = [path(one, [l2], BatchedObjective(one, float64_size=0), 1e-10)[0][0] for one in (problem, chunked)]
        np.testing.assert_allclose(*exact, atol=1e-6)
    assert most <= 4096


def test_several_labels_are_solved_as_one_problem_each() -> None:
    X, first = hard(300, 30, 2)
    second = (np.arange(300) // 3) % 2
    Z = standardised(X).astype(np.float32)
    problem = even(Z, np.stack([first, second], axis=1), 2)
    [weight], [bias] = path(problem, [1e-2])
    assert gap(problem, weight, bias, 1e-2) <= 1e-6
    for row, y in zip(weight, (first, second), strict=True):
        [alone], _ = path(even(Z, y, 2), [1e-2])
        np.testing.assert_allclose(row, alone[0], atol=5e-3)


def test_a_solver_that_does_not_converge_warns() -> None:
    objective = BatchedObjective(hard_problem(200, 20, 3))
    with pytest.warns(RuntimeWarning) as caught:
        minimise(objective, [1e-6], *start(objective.problem), max_steps=1)
    assert "newton has not converged at l2 = 1e-06" in str(caught[-1].message)

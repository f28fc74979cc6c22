"""Fitting: one head for one l2, or a path over l2 from which validation data choose.

>>> path = fit_path(X, y, X_val, y_val, classes=("cat", "dog"))
>>> path.l2, path.head.predict_proba(X_test)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import UsageError
from embedpipe.evaluation import binary_log_loss, log_loss
from embedpipe.heads._problem import ChunkedFeatures, Features, Float64, PathWeights, Problem
from embedpipe.heads._standardisation import check_labelled, fold, make_problem
from embedpipe.heads.knn import KnnHead
from embedpipe.heads.linear import LinearHead
from embedpipe.provenance import nearest

L2_GRID: tuple[float, ...] = tuple(float(l2) for l2 in np.logspace(-6, 2, 45))
SOLVERS = ("newton", "lbfgs", "sklearn", "ridge")
# of each task; the first is the default
TASK_SOLVERS = {"single": SOLVERS, "multilabel": ("newton", "ridge"), "regression": ("ridge",)}
SolvePath = Callable[[Sequence[float]], PathWeights]
Polish = Callable[[Float64, Float64, float], PathWeights]


@dataclass(frozen=True)
class L2Point:
    """One l2: the training objective and the validation metrics, None if there are no validation data.

    loo_accuracy : leave-one-out accuracy on train, of the solver `ridge`
    val_rmse, loo_rmse : of numbers, in their unit; val_accuracy and val_log_loss are None
    """

    l2: float
    objective: float
    val_accuracy: float | None = None
    val_log_loss: float | None = None
    loo_accuracy: float | None = None
    val_rmse: float | None = None
    loo_rmse: float | None = None


@dataclass(frozen=True, eq=False)
class L2Path:
    """The chosen head, its l2, and all points in rising order of l2; a kNN head has neither l2 nor points."""

    head: LinearHead | KnnHead
    l2: float | None
    points: tuple[L2Point, ...]


def fit_linear(
    X: Features,
    y: ArrayLike,
    *,
    classes: Sequence[str],
    l2: float,
    task: str = "single",
    solver: str = "auto",
    **options: Any,
) -> LinearHead:
    """Minimise mean cross-entropy + l2/2 * ||W||^2 (bias free) on standardised features.

    For several labels per image, the loss is the mean over images of the sum over labels of binary cross-entropy; for numbers,
    half the mean squared error of targets of mean 0 and std 1.

    Parameters
    ----------
    X : float (N, D)                        features, one row per image, any scale
    y : int (N,)                            class index in [0, C); a class may lack samples. Several labels: 0 and 1 (N, C);
                                            numbers: float (N,)
    classes : C names                       one for numbers
    l2 : float > 0                          on the mean loss; scikit-learn's C = 1 / (N * l2)
    task : str                              single, multilabel or regression
    solver : str                            auto, newton, lbfgs, sklearn or ridge
    standardize : bool, optional            whether features are scaled to unit variance; the default
    sample_weight : float (N,), optional    not negative, divided by its sum
    widths : sequence of int, optional      of blocks of features side by side that weigh the same (`block_scales`)
    memory_bytes : float                    that the solver may use besides X, which may be `ChunkedFeatures`; 1 GiB at most
    gram : Gram, optional                   of X and y, for `ridge` with single labels without weights

    Raises
    ------
    UsageError           fewer than two classes with samples, l2 <= 0, unknown solver, or one that does not support the task
    NonFiniteFeatures    X has NaN or inf; the first bad row is named

    Source: Bishop, PRML 4.3.4.
    """
    [value], name = _check_l2s([l2]), _check_solver(solver, task, chunked=isinstance(X, ChunkedFeatures))
    problem = make_problem(X, y, classes=classes, task=task, **options)
    solve_path, _ = _prepare_solver(name, problem)
    return _make_heads(problem, name, [value], *solve_path([value]))[0]


def fit_path(
    X: Features,
    y: ArrayLike,
    X_val: Features | None,
    y_val: ArrayLike | None,
    *,
    classes: Sequence[str],
    l2: float | str = "auto",
    task: str = "single",
    solver: str = "auto",
    grid: Sequence[float] = L2_GRID,
    **options: Any,
) -> L2Path:
    """Fit a head for every l2 of a grid, or for a single l2, on train, and choose on validation.

    For classes, the highest validation accuracy wins; ties go to the lowest log loss, then to the largest l2. For several labels,
    the lowest log loss wins, because metrics of ranking such as mean average precision ignore the threshold of 0.5. For numbers,
    the lowest RMSE wins. X_val and y_val may be None or empty if l2 is a number, and with the solver `ridge`, which then uses its
    leave-one-out accuracy or error. All else, `options` too, as in `fit_linear`.
    """
    l2s = _check_l2s(grid if isinstance(l2, str) and l2 == "auto" else [l2])
    validation = None
    if X_val is not None and y_val is not None and len(np.asarray(y_val)):
        validation = check_labelled(X_val, y_val, len(classes), task)
    name = _check_solver(solver, task, chunked=isinstance(X, ChunkedFeatures))
    if validation is None and len(l2s) > 1 and name != "ridge":
        raise UsageError(
            "no validation samples, expected some to choose l2 on", hint="give one l2 as a number, or keep a val split"
        )
    problem = make_problem(X, y, classes=classes, task=task, **options)
    solve_path, polish = _prepare_solver(name, problem, is_path=len(l2s) > 1)
    weights, biases, extra = solve_path(l2s)
    heads = _make_heads(problem, name, l2s, weights, biases, extra)
    points = [_validate(head, validation) for head in heads]
    best = max(range(len(points)), key=lambda i: _rank(points[i]))
    if polish:
        heads[best] = _make_heads(problem, name, [l2s[best]], *polish(weights[best], biases[best], l2s[best]))[0]
        points[best] = _validate(heads[best], validation)
    return L2Path(heads[best], l2s[best], tuple(points[::-1]))


def _check_solver(name: str, task: str, *, chunked: bool) -> str:
    """Return the name of the solver.

    Raises
    ------
    UsageError    no such solver, or it does not support the task or features that are read in chunks
    """
    if task not in TASK_SOLVERS:
        raise UsageError(f"no task {task!r}, expected {', '.join(TASK_SOLVERS)}")
    able = TASK_SOLVERS[task]
    name = able[0] if name == "auto" else name
    if name not in SOLVERS:
        close = nearest(name, ("auto", *SOLVERS))
        hint = f"did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"no solver {name!r}, expected auto, {', '.join(SOLVERS)}", hint=hint, solver=name)
    if name not in able:
        raise UsageError(f"the solver {name} does not support {task} targets", hint=f"use {' or '.join(able)}")
    if chunked and name in ("lbfgs", "sklearn"):
        raise UsageError(f"the solver {name} holds all features in memory", hint="use newton or ridge, or more memory")
    return name


def _prepare_solver(name: str, problem: Problem, *, is_path: bool = False) -> tuple[SolvePath, Polish | None]:
    """Return a solver of the problem, and a function that improves one of its solutions; imports torch or scikit-learn."""
    if name == "newton":
        from embedpipe.heads import _newton
        from embedpipe.heads._batched_objective import BatchedObjective, has_native_bfloat16

        objective = BatchedObjective(problem, bfloat16=is_path and has_native_bfloat16())
        return partial(_newton.solve_path, objective), partial(_newton.polish, objective)
    if name == "lbfgs":
        from embedpipe.heads._lbfgs import solve_path
    elif name == "sklearn":
        from embedpipe.heads._sklearn import solve_path
    elif name == "ridge":
        from embedpipe.heads._ridge import solve_path
    else:
        raise ValueError(f"{name!r} is among the solvers, but nothing solves it here")
    return partial(solve_path, problem), None


def _check_l2s(l2s: Sequence[Any]) -> list[float]:
    """Return distinct l2 in falling order."""
    for l2 in l2s:
        if not (isinstance(l2, int | float | np.number) and math.isfinite(l2) and l2 > 0):
            raise UsageError(f"l2 = {l2!r}, expected a positive number")
    return sorted({float(l2) for l2 in l2s}, reverse=True)


def _make_heads(
    problem: Problem, solver: str, l2s: Sequence[float], weights: Float64, biases: Float64, extra: dict[str, Float64]
) -> list[LinearHead]:
    """Return a head for each l2, of what a solver returns."""
    heads = []
    for index, (l2, weight, bias) in enumerate(zip(l2s, weights, biases, strict=True)):
        values = {name: float(column[index]) for name, column in extra.items()}
        objective = values.pop("objective") if "objective" in values else problem.objective(weight, bias, l2)
        provenance = {"solver": solver, "l2": l2, "objective": objective, **problem.provenance, **values}
        heads.append(fold(problem, weight, bias, provenance))
    return heads


def _validate(head: LinearHead, validation: tuple[Any, Any] | None) -> L2Point:
    fitted: dict[str, Any] = {field.name: head.provenance.get(field.name) for field in fields(L2Point)}
    point = L2Point(**fitted)
    if validation is None:
        return point
    X, y = validation
    predicted = head.predict_proba(X)
    if head.task == "regression":
        return replace(point, val_rmse=float(np.sqrt(np.mean((predicted[:, 0] - y) ** 2))))
    if head.task == "multilabel":
        return replace(point, val_log_loss=binary_log_loss(predicted, y))
    accuracy = float(np.mean(predicted.argmax(axis=1) == y))
    return replace(point, val_accuracy=accuracy, val_log_loss=log_loss(predicted, y))


def _rank(point: L2Point) -> tuple[float, float, float]:
    """Return a key that is largest for the point to choose."""
    rmse = point.loo_rmse if point.val_rmse is None else point.val_rmse
    if rmse is not None:
        return -rmse, 0.0, point.l2
    if point.val_log_loss is None:
        return point.loo_accuracy or 0.0, 0.0, point.l2
    return point.val_accuracy or 0.0, -point.val_log_loss, point.l2

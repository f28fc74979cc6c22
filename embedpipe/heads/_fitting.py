"""Fitting: one head for one l2, or the l2 that held-out data select.

>>> path = fit_path(X, y, X_val, y_val, classes=("cat", "dog"))
>>> path.l2, path.head.predict_proba(X_test)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedpipe.errors import UsageError
from embedpipe.evaluation import losses, negative_log
from embedpipe.heads._optima import Optima
from embedpipe.heads._problem import TOLERANCE, ChunkedFeatures, Features, Float64, Fold, Problem, select_rows
from embedpipe.heads._search import search
from embedpipe.heads._standardisation import check_labelled, fold, make_problem
from embedpipe.heads.knn import KnnHead
from embedpipe.heads.linear import LinearHead
from embedpipe.provenance import nearest

L2_GRID: tuple[float, ...] = tuple(float(l2) for l2 in np.logspace(-6, 2, 45))
SOLVERS = ("newton", "lbfgs", "sklearn", "ridge")  # lbfgs and sklearn are two names of one
# of each task; the first is the default
TASK_SOLVERS = {"single": SOLVERS, "multilabel": ("newton", "ridge"), "regression": ("ridge",)}
SELECT = ("log-loss", "accuracy")
HeldOut = tuple[Optima, Features, Any]  # optima of a problem, and rows (n, D) and targets that it is not fitted on
# by l2: point, loss and correctness of the held-out rows
Tried = dict[float, tuple[dict[str, float], Float64, NDArray[np.bool_]]]
# of the gap: while l2 is searched, and of the heads that are returned, whose weights are then within 1e-6 of the optimum
SEARCH_TOLERANCE, FINAL_TOLERANCE = 1e-2, 1e-13


@dataclass(frozen=True, eq=False)
class L2Path:
    """The chosen head, its l2, and what was tried; a kNN head has neither l2 nor points.

    points : dicts in rising order of l2    l2, objective (on train, of folds their mean), and of held-out rows val_accuracy and
                                            val_log_loss, or val_rmse; of `ridge` also loo_accuracy or loo_rmse, each training
                                            row left out
    losses, correct : of each held-out row at the chosen l2, float64 and bool (n,); empty without held-out rows, and for kNN
                      there is no `correct`
    selected_on : "val", "folds", "train" (each row left out) or None, if nothing was selected
    """

    head: LinearHead | KnnHead
    l2: float | None
    points: tuple[dict[str, float], ...] = ()
    losses: Float64 = field(default_factory=lambda: np.zeros(0))
    correct: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    selected_on: str | None = None


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
    widths : sequence of int, optional      of blocks of features side by side
    block_weights : sequence of float, optional    of these blocks (`block_scale_factors`); by default they weigh the same
    memory_bytes : float                    that the solver may use besides X, which may be `ChunkedFeatures`; 1 GiB at most

    Raises
    ------
    UsageError           fewer than two classes with samples, l2 <= 0, unknown solver, or one that does not support the task
    NonFiniteFeatures    X has NaN or inf; the first bad row is named

    Source: Bishop, PRML 4.3.4.
    """
    [l2] = _check_l2s([l2])
    return cast(
        LinearHead, fit_path(X, y, None, None, classes=classes, l2=l2, task=task, solver=solver, **options).head
    )


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
    select: str = "log-loss",
    folds: Sequence[Fold] = (),
    grid: Sequence[float] = L2_GRID,
    **options: Any,
) -> L2Path:
    """Fit a head on train, with the l2 that has the lowest log loss on validation data or on folds.

    The grid is searched: only some of its values are tried, with an objective that is within 1 % of its minimum. The head of
    the selected l2 is solved exactly, so its weights do not depend on what was tried.

    Parameters
    ----------
    X_val, y_val : validation data    may be None or empty if l2 is a number, with folds, and with the solver `ridge`, which tries
                                      every l2 and then selects by the leave-one-out accuracy or error
    select : str                      log-loss, or accuracy: every l2 of the grid is tried and the highest accuracy wins; ties go
                                      to the lowest log loss, then to the largest l2. `ridge` always selects by accuracy, for
                                      numbers by the lowest RMSE
    folds : sequence of Fold          select on these rows together, instead of validation data; rows of a class that a fold's
                                      training part lacks do not count
    X, y, classes, l2, task, solver, options    as in `fit_linear`
    """
    l2s = _check_l2s(grid if isinstance(l2, str) and l2 == "auto" else [l2])
    if select not in SELECT:
        raise UsageError(f"select is {select!r}, expected {' or '.join(SELECT)}")
    from embedpipe.heads._threads import row_threads

    name, selects = _check_solver(solver, task, chunked=isinstance(X, ChunkedFeatures)), len(l2s) > 1
    problem = make_problem(X, y, classes=classes, task=task, **options)
    with row_threads() as pool:
        optima, left_out = _open(name, problem, pool, l2s)
        held_out = [(optima, *_known(problem, X_val, y_val))]
        if folds and selects and name != "ridge":
            held_out = [_open_fold(name, one, pool, classes=classes, task=task, **options) for one in folds]
        if selects and not left_out and not any(len(truth) for _, _, truth in held_out):
            hint = "give one l2 as a number, or keep a val split"
            raise UsageError("no validation samples, expected some to choose l2 on", hint=hint)
        if not selects or select == "accuracy" or name == "ridge":
            tried = _try_out(held_out, l2s, TOLERANCE)
        else:
            tried = _search(held_out, l2s)
        for one, scores in left_out.items():
            tried[one][0].update(scores)
        chosen = min(tried, key=lambda one: (*_rank(tried[one][0], select == "accuracy" or name == "ridge"), -one))
        on_val = held_out[0][0] is optima
        if on_val and not left_out:
            tried |= _try_out(held_out, [chosen], FINAL_TOLERANCE)
        else:
            optima.find([chosen], FINAL_TOLERANCE)
    weight, bias, objective = optima.found[chosen]
    fitted = {"solver": name, "l2": chosen, "objective": objective, **left_out.get(chosen, {}), **problem.provenance}
    points = tuple(tried[one][0] for one in sorted(tried))
    _, loss, correct = tried[chosen]
    selected_on = ("train" if not len(loss) else "val" if on_val else "folds") if selects else None
    return L2Path(fold(problem, weight, bias, fitted), chosen, points, loss, correct, selected_on)


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


def _open(
    name: str, problem: Problem, pool: ThreadPoolExecutor | None, l2s: Sequence[float]
) -> tuple[Optima, dict[float, dict[str, float]]]:
    """Return the optima of a problem, and scores of `ridge` by l2; imports torch or scikit-learn.

    None is found yet, except for `ridge`, which solves every l2 at once.
    """
    if name == "ridge":
        from embedpipe.heads._ridge import solve_path

        *solution, score_name, scores = solve_path(problem, l2s)
        optima = Optima(problem, None)
        optima.found |= zip(l2s, zip(*solution, strict=True), strict=True)
        return optima, {l2: {score_name: float(score)} for l2, score in zip(l2s, scores, strict=True)}
    if name == "newton":
        from embedpipe.heads._newton import make_solver
    else:
        from embedpipe.heads._sklearn import make_solver
    return Optima(problem, make_solver(problem, pool)), {}


def _open_fold(name: str, one: Fold, pool: ThreadPoolExecutor | None, **options: Any) -> HeldOut:
    problem = make_problem(one.X, one.y, **{**options, "sample_weight": one.sample_weight})
    return _open(name, problem, pool, ())[0], *_known(problem, one.X_held_out, one.y_held_out)


def _known(problem: Problem, X: Features | None, y: ArrayLike | None) -> tuple[Features, Any]:
    """Return checked held-out rows whose class the problem has; no rows for None."""
    if X is None or y is None:
        return problem.X[:0], problem.y[:0]
    features, truth = check_labelled(X, y, len(problem.classes), problem.task)
    known = np.flatnonzero(np.isin(truth, problem.present)) if problem.task == "single" else np.arange(len(truth))
    return (features, truth) if len(known) == len(truth) else (select_rows(features, known), truth[known])


def _search(held_out: Sequence[HeldOut], falling: Sequence[float]) -> Tried:
    """Try the l2 of a grid that lead to the lowest mean loss."""
    tried: Tried = {}

    def evaluate(l2s: Sequence[float]) -> list[float]:
        tried.update(_try_out(held_out, l2s, SEARCH_TOLERANCE))
        return [tried[l2][0]["val_log_loss"] for l2 in l2s]

    search(evaluate, falling, at_once=held_out[0][0].batch)
    return tried


def _try_out(held_out: Sequence[HeldOut], l2s: Sequence[float], tolerance: float) -> Tried:
    """Solve for some l2, and score the held-out rows."""
    tried: Tried = {}
    for optima, _, _ in held_out:
        optima.find(l2s, tolerance)
    for l2 in l2s:
        loss, correct = zip(*(_score(*one, l2) for one in held_out), strict=True)
        objective = float(np.mean([optima.found[l2][2] for optima, _, _ in held_out]))
        scores = _summarise(held_out[0][0].problem.task, np.concatenate(loss), np.concatenate(correct))
        tried[l2] = {"l2": l2, "objective": objective, **scores}, np.concatenate(loss), np.concatenate(correct)
    return tried


def _score(optima: Optima, X: Features, y: Any, l2: float) -> tuple[Float64, NDArray[np.bool_]]:
    """Return the loss of each held-out row (n,), of numbers the squared error, and whether its classes are predicted."""
    problem, (weight, bias, _) = optima.problem, optima.found[l2]
    if not len(y):
        return np.zeros(0), np.zeros(0, dtype=bool)
    predicted = fold(problem, weight, bias, {}, absent_logit=-np.inf).predict_proba(X)
    if problem.task == "regression":
        return (predicted[:, 0] - y) ** 2, predicted[:, 0] == y
    if problem.task == "single":
        return losses(predicted, y), predicted.argmax(axis=1) == y
    predicted, truth = predicted[:, problem.present], y[:, problem.present] > 0
    loss = negative_log(np.where(truth, predicted, 1 - predicted)).mean(axis=1)
    return loss, ((predicted > 0.5) == truth).all(axis=1)


def _summarise(task: str, loss: Float64, correct: NDArray[np.bool_]) -> dict[str, float]:
    """Return the scores of held-out rows, if there are any."""
    if not len(loss):
        return {}
    mean = float(loss.mean())
    if task == "regression":
        return {"val_rmse": mean**0.5}
    return (
        {"val_log_loss": mean}
        if task == "multilabel"
        else {"val_accuracy": float(correct.mean()), "val_log_loss": mean}
    )


def _rank(point: dict[str, float], by_accuracy: bool) -> tuple[float, float]:
    """Return a key that is smallest for the point to choose."""
    if "loo_rmse" in point:
        return point.get("val_rmse", point["loo_rmse"]), 0.0
    loss = point.get("val_log_loss", 0.0)
    accuracy = point.get("val_accuracy", 0.0 if "val_log_loss" in point else point.get("loo_accuracy", 0.0))
    return (-accuracy, loss) if by_accuracy else (loss, -accuracy)


def _check_l2s(l2s: Sequence[Any]) -> list[float]:
    """Return distinct l2 in falling order."""
    for l2 in l2s:
        if not (isinstance(l2, int | float | np.number) and math.isfinite(l2) and l2 > 0):
            raise UsageError(f"l2 = {l2!r}, expected a positive number")
    return sorted({float(l2) for l2 in l2s}, reverse=True)

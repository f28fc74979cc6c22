"""Fitting: one head for one l2, or a path over l2 with the choice made on validation.

>>> path = fit_path(X, y, X_val, y_val, classes=("cat", "dog"))
>>> path.l2, path.head.predict_proba(X_test)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import UsageError
from embedpipe.evaluation import binary_log_loss, score
from embedpipe.heads._frame import Frame, check_labelled, make_frame
from embedpipe.heads._gram import Gram
from embedpipe.heads._problem import MEMORY_BYTES, Chunked, Problem, Solution
from embedpipe.heads.linear import LinearHead
from embedpipe.provenance import nearest

L2_GRID: tuple[float, ...] = tuple(float(l2) for l2 in np.logspace(-6, 2, 45))
SOLVERS = ("newton", "lbfgs", "sklearn", "ridge")
SOLVERS_OF = {"single": SOLVERS, "multilabel": ("newton", "ridge"), "regression": ("ridge",)}  # the first is auto
Solver = Callable[[Problem, Sequence[float], Solution | None], list[Solution]]


@dataclass(frozen=True)
class PathPoint:
    """One l2: the objective on train, and what validation says (None where there is none).

    loo_accuracy: of train, each sample left out in turn (solver `ridge`)
    val_rmse, loo_rmse: of numbers, in their unit, instead; several labels have no val_accuracy
    """

    l2: float
    objective: float
    val_accuracy: float | None
    val_log_loss: float | None
    loo_accuracy: float | None = None
    val_rmse: float | None = None
    loo_rmse: float | None = None


@dataclass(frozen=True, eq=False)
class Path:
    """The head that was chosen, its l2, and all points in rising order of l2."""

    head: LinearHead
    l2: float
    points: tuple[PathPoint, ...]


def fit_linear(
    X: ArrayLike | Chunked,
    y: ArrayLike,
    *,
    classes: Sequence[str],
    l2: float,
    task: str = "single",
    solver: str = "auto",
    standardize: bool = True,
    sample_weight: ArrayLike | None = None,
    warm_start: LinearHead | None = None,
    memory_bytes: int = MEMORY_BYTES,
    gram: Gram | None = None,
) -> LinearHead:
    """Minimise mean cross-entropy + l2/2 * ||W||^2 (bias free) on standardised features.

    Of several labels an image, the mean over images of the sum over labels of binary cross-entropy; of numbers, half the mean
    squared error of targets of mean 0 and std 1.

    Parameters
    ----------
    X : float (N, D)                        features, one row an image, any scale
    y : int (N,)                            class index in [0, C); a class may lack samples. Several labels: 0 and 1 (N, C);
                                            numbers: float (N,)
    classes : C names                       of numbers one
    task : str                              single, multilabel or regression
    l2 : float > 0                          on the mean loss; scikit-learn's C = 1 / (N * l2)
    sample_weight : float (N,), optional    not negative, divided by its sum
    warm_start : LinearHead, optional       of the same classes and width
    memory_bytes : int                      that the solver may take beside X, which may be `Chunked`
    gram : Gram, optional                   of X and y, single labels without weights: `ridge` need not compute it

    Raises
    ------
    UsageError           fewer than two classes with samples, l2 <= 0, unknown solver, or one that does not do the task
    NonFiniteFeatures    X has NaN or inf; the first bad row is named

    Source: Bishop, PRML 4.3.4.
    """
    name, solve_path = _solver(solver, task, chunked=isinstance(X, Chunked))
    shape: dict[str, Any] = {
        "classes": classes,
        "standardize": standardize,
        "sample_weight": sample_weight,
        "task": task,
    }
    frame = make_frame(X, y, **shape, memory_bytes=memory_bytes, gram=gram)
    start = frame.solution_of(warm_start) if warm_start else None
    [solution] = solve_path(frame.problem, _falling([l2]), start)
    return _head(frame, solution, l2, solver=name, standardize=standardize)


def fit_path(
    X: ArrayLike | Chunked,
    y: ArrayLike,
    X_val: ArrayLike | Chunked | None,
    y_val: ArrayLike | None,
    *,
    classes: Sequence[str],
    l2: float | str = "auto",
    task: str = "single",
    solver: str = "auto",
    standardize: bool = True,
    sample_weight: ArrayLike | None = None,
    grid: Sequence[float] = L2_GRID,
    memory_bytes: int = MEMORY_BYTES,
    gram: Gram | None = None,
) -> Path:
    """Fit a head for every l2 of a grid (or the one given) on train, and choose on validation.

    The highest validation accuracy wins; ties go to the lowest log loss, then to the largest l2. Of several labels the lowest
    log loss wins: ranks alone, such as mean average precision, do not say whether 0.5 is the place to cut. Of numbers the
    lowest error (RMSE), which is the highest R2.
    X_val and y_val may be None or empty where l2 is a number, and with the solver ridge, which then asks its leave-one-out
    accuracy or error. All else as in `fit_linear`.
    """
    values = _falling(grid if isinstance(l2, str) and l2 == "auto" else [l2])
    validation = _validation(X_val, y_val, len(classes), task)
    name, solve_path = _solver(solver, task, chunked=isinstance(X, Chunked))
    if validation is None and len(values) > 1 and name != "ridge":
        raise UsageError(
            "no validation samples, expected some to choose l2 on", hint="give one l2 as a number, or keep a val split"
        )
    shape: dict[str, Any] = {
        "classes": classes,
        "standardize": standardize,
        "sample_weight": sample_weight,
        "task": task,
    }
    frame = make_frame(X, y, **shape, memory_bytes=memory_bytes, gram=gram)
    solutions = solve_path(frame.problem, values, None)
    heads = [
        _head(frame, one, l2, solver=name, standardize=standardize) for one, l2 in zip(solutions, values, strict=True)
    ]
    points = [_point(head, validation) for head in heads]
    best = max(range(len(points)), key=lambda i: _merit(points[i]))
    if name == "newton":
        from embedpipe.heads._newton import polish

        solution = polish(frame.problem, solutions[best], values[best])
        heads[best] = _head(frame, solution, values[best], solver=name, standardize=standardize)
        points[best] = _point(heads[best], validation)
    return Path(heads[best], values[best], tuple(points[::-1]))


def _solver(name: str, task: str = "single", *, chunked: bool = False) -> tuple[str, Solver]:
    """Return a solver and its name; torch and scikit-learn are only imported here.

    Raises
    ------
    UsageError    no such solver, or it does not do the task, or takes no features that are read in chunks
    """
    if task not in SOLVERS_OF:
        raise UsageError(f"no task {task!r}, expected {', '.join(SOLVERS_OF)}")
    able = SOLVERS_OF[task]
    if name == "auto":
        name = able[0]
    if name in SOLVERS and name not in able:
        raise UsageError(f"the solver {name} knows no {task} targets", hint=f"take {' or '.join(able)}")
    if chunked and name in ("lbfgs", "sklearn"):
        raise UsageError(f"the solver {name} holds all features in memory", hint="take newton or ridge, or more memory")
    if name == "newton":
        from embedpipe.heads import _newton

        return "newton", _newton.solve_path
    if name == "lbfgs":
        from embedpipe.heads import _lbfgs

        return "lbfgs", _lbfgs.solve_path
    if name == "sklearn":
        from embedpipe.heads import _sklearn

        return "sklearn", _sklearn.solve_path
    if name == "ridge":
        from embedpipe.heads import _ridge

        return "ridge", _ridge.solve_path
    close = nearest(name, ("auto", *SOLVERS))
    raise UsageError(
        f"no solver {name!r}, expected auto, {', '.join(SOLVERS)}",
        hint=f"did you mean {close[0]!r}?" if close else "",
        solver=name,
    )


def _falling(l2s: Sequence[Any]) -> list[float]:
    wrong = [l2 for l2 in l2s if not (isinstance(l2, int | float | np.number) and math.isfinite(l2) and l2 > 0)]
    if wrong or not len(l2s):
        raise UsageError(
            f"l2 = {wrong[0]!r}, expected a positive number" if wrong else "no l2, expected a positive number"
        )
    return sorted({float(l2) for l2 in l2s}, reverse=True)


def _head(frame: Frame, solution: Solution, l2: float, *, solver: str, standardize: bool) -> LinearHead:
    provenance = {
        "solver": solver,
        "l2": l2,
        "objective": frame.problem.objective(solution, l2) if solution.objective is None else solution.objective,
        "standardize": standardize,
        "n_train": len(frame.problem.y),
    }
    if solution.loo_accuracy is not None:
        provenance["loo_accuracy"] = solution.loo_accuracy
    if solution.loo_rmse is not None:
        provenance["loo_rmse"] = solution.loo_rmse * frame.asked.scale
    return frame.head_of(solution, provenance)


def _validation(
    X: ArrayLike | Chunked | None, y: ArrayLike | None, n_classes: int, task: str
) -> tuple[ArrayLike, ArrayLike] | None:
    if X is None or y is None or not len(np.asarray(y)):
        return None
    return check_labelled(X, y, n_classes, task)


def _point(head: LinearHead, validation: tuple[ArrayLike, ArrayLike] | None) -> PathPoint:
    made = head.provenance
    blank = PathPoint(
        made["l2"], made["objective"], None, None, made.get("loo_accuracy"), loo_rmse=made.get("loo_rmse")
    )
    if validation is None:
        return blank
    X, y = validation
    found = head.predict_proba(X)
    if head.task == "regression":
        return replace(blank, val_rmse=float(np.sqrt(np.mean((found[:, 0] - np.asarray(y)) ** 2))))
    if head.task == "multilabel":
        return replace(blank, val_log_loss=binary_log_loss(found, y))
    scores = score(found, y)
    return replace(blank, val_accuracy=scores["accuracy"], val_log_loss=scores["log_loss"])


def _merit(point: PathPoint) -> tuple[float, float, float]:
    rmse = point.loo_rmse if point.val_rmse is None else point.val_rmse
    if rmse is not None:
        return -rmse, 0.0, point.l2
    if point.val_log_loss is None:
        return point.loo_accuracy or 0.0, 0.0, point.l2
    return point.val_accuracy or 0.0, -point.val_log_loss, point.l2

"""The deed: open the features, fit, score, look for leaks, and say how much the scores may be trusted."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.commands.fit_head._plot import draw_path
from embedpipe.errors import EmbedpipeWarning, UsageError

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.classifier import Classifier, Scored
    from embedpipe.features import FeatureSet
    from embedpipe.heads import Chunked
    from embedpipe.heads import Path as HeadPath
    from embedpipe.selection import Fitted, Recipe

PathLike = str | os.PathLike[str]
PLACES = ("features", "cache_dir", "runs_dir")  # arguments that do not shape a head
POINT = {  # of l2_path, by task
    "single": ("l2", "val_accuracy", "objective"),
    "multilabel": ("l2", "val_log_loss", "objective"),
    "regression": ("l2", "val_rmse", "loo_rmse", "objective"),
}


def fit_head(
    features: FeatureSet | PathLike | None = None,
    *,
    solver: Literal["auto", "newton", "lbfgs", "sklearn", "ridge", "knn"] = "auto",
    l2: float | Literal["auto"] = "auto",
    refit: bool = False,
    calibrate: bool = False,
    standardize: bool = True,
    class_weight: Literal["none", "balanced"] = "none",
    shots: tuple[str | int, ...] | str = (),
    repeats: int = 5,
    folds: int | None = None,
    max_memory: str = "4GB",
    space: tuple[str, ...] | str = (),
    backbone: tuple[str, ...] | str = (),
    layer: tuple[str, ...] | str = (),
    compare_layers: bool = False,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    seed: int = 0,
) -> Classifier:
    """Fit a head on the train split, choose l2 on val, and score test once.

    The objective is mean cross-entropy + l2/2 * ||W||^2 on standardised features, bias free. Where a manifest has `labels`, the
    cross-entropies of all labels of an image are summed, and the lowest log loss on val chooses l2. Where it has a `target`,
    the objective is half the mean squared error of standardised targets + l2/2 * ||w||^2, and the lowest error chooses.

    Parameters
    ----------
    features : FeatureSet, or name, id or path of a data set
        Default: the data set extracted last.
    solver : str
        newton (auto), lbfgs and sklearn solve the same objective; ridge fits least squares, in the least time; knn asks the
        nearest training images. Several labels: newton or ridge; numbers: ridge.
    l2 : float or auto
        Strength of the penalty; auto takes the best of 45 values on val.
    refit : bool
        Fit once more on train and val together, with the l2 chosen.
    calibrate : bool
        Divide the logits by the temperature that fits val; which class is the most probable stays.
    standardize : bool
        Scale features by mean and std of the train split; the scale is folded into the head.
    class_weight : str
        balanced gives every class the same weight.
    shots : several
        Learning curve: heads on 1,2,5,10 training images a class, or on 10%,50% of them.
    repeats : int
        Random draws for each point of the learning curve.
    folds : int
        Cross-validate over train and val, with that many folds; test is left out.
    max_memory : str
        Memory that fitting may take beside the list of images; features that need more (three times their size) are read from
        the cache as they are needed. The solvers lbfgs, sklearn and knn, and a head on several layers, hold them all.
    space : str or several
        Which space, when the data set has features in several: its folder's name or a prefix; repeatable, as --layer is.
    backbone : str or several
        Take the space of this backbone; repeatable.
    layer : str or several
        Take the space of this layer; repeatable, all means every cached one. Of several, those that help on val are used
        together, and the last layer alone where that is no better.
    compare_layers : bool
        Rank every cached space on val (those of --backbone and --layer, if given), and take the best.

    Returns
    -------
    Classifier
        With the run's scores in `report`.

    Raises
    ------
    UsageError          nothing extracted, no labels, fewer than two classes, no validation samples
    NonFiniteFeatures   NaN or inf in the features
    """
    given = locals()
    from embedpipe.classifier import Classifier, Reference, calibrated, save_run
    from embedpipe.runs import new_run
    from embedpipe.selection import Recipe, find_leaks, parse_shots
    from embedpipe.storage import BYTES, parse_amount

    start = time.monotonic()
    asked_shots = parse_shots(shots)
    most = parse_amount(max_memory, BYTES, "--max-memory", "4GB")
    asked: dict[str, Any] = {"space": space, "backbone": backbone, "layer": layer, "every": compare_layers}
    features = _open(features, Path(cache_dir), asked)
    task = features.manifest.task
    recipe = Recipe(features.classes, solver, l2, standardize, class_weight, features.widths, most, task)
    others = {"--shots": asked_shots, "--folds": folds, "--calibrate": calibrate, "--compare-layers": compare_layers}
    _check(features, recipe, others)
    features, choice = _choose(features, recipe, compare=compare_layers)
    recipe = replace(recipe, widths=features.widths)
    fitted, report = _fit(features, recipe, refit=refit)
    if choice or calibrate:
        report |= {**choice, "chosen_on": "val"}
    if calibrate:
        fitted = replace(fitted, head=calibrated(fitted.head, features, unseen_val=not refit))
    classifier = Classifier(fitted.head, Reference.of(features.spaces), _backbone=features.backbone)
    scored = _predict(features, fitted, recipe)
    report["options"] = {name: value for name, value in given.items() if name not in PLACES}
    report |= {"dataset": features.dataset, "task": task, "classes": list(features.classes)}
    report["leaks"] = find_leaks(features, scored, max_bytes=most)
    if asked_shots:
        report["curve"] = _curve(features, recipe, asked_shots, repeats=repeats, seed=seed)
    if folds is not None:
        report["folds"] = _folds(features, recipe, folds, seed)
    with new_run(Path(runs_dir), "fit-head") as run:
        if len(report["l2_path"]) > 1:
            run.write_text("l2_path.svg", draw_path(report["l2_path"], chosen=report["l2"]))
        seconds = time.monotonic() - start
        return save_run(run, "fit-head", classifier, features, scored, report, seconds=seconds)


def _open(features: FeatureSet | PathLike | None, cache_dir: Path, asked: dict[str, Any]) -> FeatureSet:
    """Return the features that are asked for, of images that a head can be fitted on."""
    from embedpipe.cache import Cache
    from embedpipe.features import FeatureSet, open_features
    from embedpipe.selection import check_classes, check_labelled

    if isinstance(features, FeatureSet):
        found = features.reopened(**asked) if any(asked.values()) else features
    else:
        found = open_features(Cache(cache_dir), None if features is None else os.fspath(features), **asked)
    check_labelled(found)
    check_classes(found)
    return found


def _check(features: FeatureSet, recipe: Recipe, others: dict[str, Any]) -> None:
    """Refuse what is asked for, as it is typed, and the solver or the task has no use for."""
    from embedpipe.selection import check_neighbours, check_task

    check_neighbours(recipe)
    given = {"--class-weight": recipe.class_weight == "balanced", **others, "a head on several layers": features.beside}
    check_task(features, *[option for option, value in given.items() if value])


def _choose(features: FeatureSet, recipe: Recipe, *, compare: bool) -> tuple[FeatureSet, dict[str, Any]]:
    """Return the features of the spaces that val chooses, and what there is to tell of the choice.

    Raises
    ------
    UsageError    a kNN head, or no validation samples, where there is a choice
    """
    from embedpipe.selection import choose_blocks, choose_space

    if not (compare or features.beside):
        return features, {}
    if recipe.solver == "knn":
        raise UsageError("--solver knn takes one space", hint="name one --layer, or fit a linear head")
    if "val" not in features.splits:
        raise UsageError(
            f"{features.manifest.name} has no validation samples to choose layers on",
            hint="name one --layer, or add val/ images",
        )
    chosen = (choose_space if compare else choose_blocks)(features, lambda some: _path(some, recipe))
    return chosen.features, chosen.report


def _path(features: FeatureSet, recipe: Recipe) -> HeadPath:
    """Fit a linear head for every l2 on train, and choose on val."""
    return replace(recipe, widths=features.widths).path(*recipe.data(features, "train"), *_val(features, recipe))


def _val(features: FeatureSet, recipe: Recipe) -> tuple[np.ndarray | Chunked, np.ndarray]:
    """Return X and y of val, without rows where there is none.

    Raises
    ------
    UsageError    there is none, and l2 is to be chosen
    """
    import numpy as np

    if "val" in features.splits:
        return recipe.data(features, "val")
    if recipe.needs_val:
        raise UsageError(
            f"{features.manifest.name} has no validation samples to choose l2 on",
            hint="name one with --l2, or add val/ images",
        )
    return np.empty((0, features.feature_dim), np.float32), np.empty(0, np.int64)


def _fit(features: FeatureSet, recipe: Recipe, *, refit: bool) -> tuple[Fitted, dict[str, Any]]:
    """Fit on train with the l2 that is best on val, and on both once more if asked; say what came of it."""

    from embedpipe.selection import Fitted

    X, y = recipe.data(features, "train")
    X_val, y_val = _val(features, recipe)
    fitted = recipe.choose(X, y, X_val, y_val)
    if refit:
        X, y = recipe.data(features, "train", "val")
        fitted = Fitted(recipe.fit(X, y, l2=fitted.l2), fitted.l2, fitted.points)
    _warn_of_an_edge(fitted)
    points = [{name: getattr(point, name) for name in POINT[recipe.task]} for point in fitted.points]
    solver = fitted.head.provenance["solver"]
    chosen_on = "val" if len(y_val) and (len(points) > 1 or (refit and recipe.solver != "knn")) else None
    found = {"solver": solver, "l2": fitted.l2, "l2_path": points, "n_train": len(y), "chosen_on": chosen_on}
    return fitted, found if recipe.solver == "knn" else {**found, "refit": refit}


def _warn_of_an_edge(fitted: Fitted) -> None:
    """Warn where the best l2 is the first or the last that was tried."""
    tried = [point.l2 for point in fitted.points]
    if len(tried) > 1 and fitted.l2 in (tried[0], tried[-1]):
        beyond, other = ("smaller", fitted.l2 / 10) if fitted.l2 == tried[0] else ("larger", fitted.l2 * 10)
        warnings.warn(
            f"the best l2, {fitted.l2:g}, lies on the edge of those that were tried: a {beyond} one may be better, "
            f"see --l2 {other:g}",
            EmbedpipeWarning,
            stacklevel=3,
        )


def _predict(features: FeatureSet, fitted: Fitted, recipe: Recipe) -> dict[str, Scored]:
    """Return the head's probabilities of each split's labelled samples."""
    from embedpipe.classifier import Scored

    split_samples = {split: features.samples(split, labelled=True) for split in features.splits}
    return {
        split: Scored(samples, fitted.head.predict_proba(recipe.rows(features, samples)), recipe.task)
        for split, samples in split_samples.items()
    }


def _curve(
    features: FeatureSet, recipe: Recipe, shots: dict[str | int, int | float], *, repeats: int, seed: int
) -> list[dict[str, Any]]:
    from embedpipe.selection import learning_curve

    samples = {split: features.samples(split, labelled=True) for split in features.splits}
    pairs: dict[str, Any] = {
        k: (recipe.rows(features, some), features.manifest.targets(some)) for k, some in samples.items()
    }
    return learning_curve(recipe, shots, pairs.pop("train"), pairs, repeats=repeats, seed=seed)


def _folds(features: FeatureSet, recipe: Recipe, folds: int, seed: int) -> dict[str, Any]:
    """Cross-validate over train and val: k, accuracy over all samples, its interval, and each fold's own."""
    from embedpipe.evaluation import wilson_interval
    from embedpipe.selection import out_of_fold

    done = out_of_fold(features, recipe, folds=folds, seed=seed)
    right = done.probabilities.argmax(axis=1) == done.labels
    per_fold = [
        {"n": int(mine.sum()), "accuracy": float(right[mine].mean()), "l2": l2}
        for l2, mine in ((l2, done.fold == number) for number, l2 in enumerate(done.l2))
    ]
    n, correct = len(right), int(right.sum())
    interval = list(wilson_interval(correct, n))
    return {"k": folds, "n": n, "accuracy": correct / n, "accuracy_ci95": interval, "per_fold": per_fold}

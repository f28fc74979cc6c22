"""fit-head: open the features, fit the head, score each split, search for leaks and save the run."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.commands.fit_head._plot import draw_path
from embedpipe.errors import UsageError, warn
from embedpipe.storage import BYTES, PathLike, parse_amount

if TYPE_CHECKING:
    from embedpipe.classifier import Classifier, Scored
    from embedpipe.features import FeatureSet
    from embedpipe.heads import L2Path
    from embedpipe.selection import Candidate, HeadConfig

LOCATIONS = ("features", "cache_dir", "runs_dir")  # arguments that do not shape a head
FLAT = 1.01  # times the lowest log loss
POINT_FIELDS = {  # of l2_path, by task
    "single": ("l2", "val_accuracy", "val_log_loss", "objective"),
    "multilabel": ("l2", "val_log_loss", "objective"),
    "regression": ("l2", "val_rmse", "loo_rmse", "objective"),
}


def fit_head(
    features: FeatureSet | PathLike | None = None,
    *,
    solver: Literal["auto", "newton", "lbfgs", "sklearn", "ridge", "knn"] = "auto",
    l2: float | Literal["auto"] = "auto",
    select: Literal["log-loss", "accuracy"] = "log-loss",
    k: int | None = None,
    temperature: float | None = None,
    views: Literal["auto", "off"] = "auto",
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
    """Fit a head on the train split, select l2 on val, and score the test split once.

    The objective is mean cross-entropy + l2/2 * ||W||^2 on standardised features; the bias is not penalised. For several
    labels per image, the binary cross-entropies of all labels are summed. For regression, the objective is half the mean
    squared error of standardised targets + l2/2 * ||w||^2.

    l2 is selected by the log loss on val. If val has fewer than 50 images, or fewer than 2 per class, it is selected by
    the log loss of 5 folds of train and val. ridge uses the accuracy on val, and regression the error on val; without val
    both leave each training image out.

    Parameters
    ----------
    features : FeatureSet, or name, id or path of a data set
        Default: the data set that was extracted last.
    solver : str
        newton (auto) and lbfgs, which is scikit-learn's and also named sklearn, minimise the same objective; ridge fits least
        squares and is the fastest; knn uses the nearest training images. Several labels: newton or ridge; regression: ridge.
    l2 : float or auto
        Penalty strength; auto searches 45 values from 1e-6 to 100.
    select : str
        What selects l2: log-loss, or accuracy on val, however small, which tries all 45 values (ties: the lowest log loss).
    k : int
        knn: number of neighbours. By default selected as l2 is, by the log loss.
    temperature : float
        knn: a neighbour votes with exp(cosine / temperature). By default selected together with k.
    views : str
        auto: fit on the cached views of the train images, too, where that lowers the log loss on val; off: on the images alone.
        An image has the same weight with and without views. kNN, ridge, regression and --shots use no views.
    refit : bool
        Fit again on train and val together, with the selected l2.
    calibrate : bool
        Divide the logits by a temperature fitted on val; the predicted classes stay the same.
    standardize : bool
        Standardise features by mean and std of the train split; the scale is folded into the head.
    class_weight : str
        balanced gives every class the same weight.
    shots : several
        Learning curve: fit heads on 1,2,5,10 training images per class, or on 10%,50% of them.
    repeats : int
        Random subsets for each point of the learning curve.
    folds : int
        Cross-validate over train and val with this many folds; test is not used.
    max_memory : str
        Memory limit of fitting, apart from the list of images. Fitting takes three times the size of the features; larger
        ones are read from the cache in chunks. lbfgs, sklearn, knn and heads on several layers need all of them in memory.
    space : str or several
        Space to use if the data set has several: folder name or prefix; repeatable, as --layer is.
    backbone : str or several
        Use the space of this backbone; repeatable.
    layer : str or several
        Use the space of this layer; repeatable, all means every cached one. Of several, the best one or some together replace
        the last layer if they predict held-out images better.
    compare_layers : bool
        Rank every cached space (of --backbone and --layer, if given) by held-out images and use the best.

    Returns
    -------
    Classifier
        Its `report` holds the scores of the run.

    Raises
    ------
    UsageError          no features, no labels, fewer than two classes, no validation samples
    NonFiniteFeatures   NaN or inf in the features
    """
    options = {name: value for name, value in locals().items() if name not in LOCATIONS}
    from embedpipe.classifier import Classifier, Reference, calibrated, save_run
    from embedpipe.runs import new_run
    from embedpipe.selection import HeadConfig, check_task, find_leaks, parse_shots

    start = time.monotonic()
    curve_points = parse_shots(shots)
    max_bytes = parse_amount(max_memory, BYTES, "--max-memory", "4GB")
    features = _open(features, Path(cache_dir), space=space, backbone=backbone, layer=layer, every=compare_layers)
    shared = (features.classes, solver, l2, standardize, class_weight, features.widths, max_bytes)
    config = HeadConfig(*shared, features.manifest.task, select, k=k, temperature=temperature)
    config.check_knn_options()
    single = {"--class-weight": class_weight == "balanced", "--shots": curve_points, "--folds": folds}
    single |= {"--calibrate": calibrate, "--compare-layers": compare_layers}
    single |= {"a head on several layers": features.extra_spaces}
    check_task(features, *[option for option, value in single.items() if value])
    candidate, selection = _select_spaces(features, config, compare=compare_layers)
    features, config = candidate.features, candidate.config
    path, report = _finish(candidate, views=views == "auto", refit=refit)
    head = calibrated(path.head, features, unseen_val=not refit) if calibrate else path.head
    if selection or calibrate:
        report |= {**selection, "chosen_on": "val"}
    scored = _predict(features, head, config)
    report |= {"options": options, "dataset": features.dataset, "task": config.task, "classes": list(features.classes)}
    report["leaks"] = find_leaks(features, scored, max_bytes=max_bytes)
    if curve_points:
        report["curve"] = _learning_curve(features, config, scored, points=curve_points, repeats=repeats, seed=seed)
    if folds is not None:
        report["folds"] = _cross_validate(features, config, report["views"], folds, seed)
    classifier = Classifier(head, Reference.of(features.spaces), _backbone=features.backbone)
    with new_run(Path(runs_dir), "fit-head") as run:
        if len(report["l2_path"]) > 1:
            run.write_text("l2_path.svg", draw_path(report["l2_path"], chosen=report["l2"]))
        return save_run(run, "fit-head", classifier, features, scored, report, seconds=time.monotonic() - start)


def _open(features: FeatureSet | PathLike | None, cache_dir: Path, **requested: Any) -> FeatureSet:
    """Return the requested features, checked for labels and classes."""
    from embedpipe.cache import Cache
    from embedpipe.features import FeatureSet, open_features
    from embedpipe.selection import check_classes, check_labelled

    if not isinstance(features, FeatureSet):
        features = open_features(Cache(cache_dir), None if features is None else os.fspath(features), **requested)
    elif any(requested.values()):
        features = features.reopened(**requested)
    check_labelled(features)
    check_classes(features)
    return features


def _select_spaces(features: FeatureSet, config: HeadConfig, *, compare: bool) -> tuple[Candidate, dict[str, Any]]:
    """Return the head of the spaces that predict held-out images best, and the report of the selection.

    Raises
    ------
    UsageError    several spaces with a kNN head or without held-out images
    """
    from embedpipe.selection import Candidate, select_blocks, select_space

    if not (compare or features.extra_spaces):
        return Candidate.fit(features, config), {}
    if config.solver == "knn":
        raise UsageError("--solver knn uses one space", hint="name one --layer, or fit a linear head")
    return (select_space if compare else select_blocks)(features, config)


def _finish(candidate: Candidate, *, views: bool, refit: bool) -> tuple[L2Path, dict[str, Any]]:
    """Try the cached views, fit again on train and val if requested, and return the head and its report."""
    from embedpipe.selection import read_views, try_views

    features, config = candidate.features, candidate.config
    path, tried = try_views(candidate) if views else (candidate.path, None)
    splits = ("train", "val") if refit else ("train",)
    if refit:
        samples, used = features.labelled_samples(*splits), bool(tried and tried["used"])
        extra = read_views(features, samples, max_bytes=config.max_bytes) if used else None
        path = replace(path, head=config.refit(*config.arrays(features, *splits), path, extra))
    if len(path.points) > 1:
        _warn_at_edge(path)
    points = [{name: point.get(name) for name in POINT_FIELDS[config.task]} for point in path.points]
    used_val = refit or tried or path.selected_on in ("val", "folds")
    report = {
        "solver": path.head.provenance["solver"],
        "l2": path.l2,
        "l2_path": points,
        "selection": describe_selection(path, config),
        "views": tried,
        "n_train": sum(len(features.samples(split, labelled=True)) for split in splits),
        "chosen_on": "val" if used_val and features.samples("val", labelled=True) else None,
    }
    if config.solver == "knn":
        return path, {**report, "k": path.head.provenance["k"], "temperature": path.head.provenance["temperature"]}
    return path, {**report, "refit": refit}


def describe_selection(path: L2Path, config: HeadConfig) -> dict[str, Any] | None:
    """Return by what and on what l2 was selected, and how flat the minimum is; None if nothing was selected.

    Returns
    -------
    dict
        by : "log loss", "accuracy" or "rmse"
        on : "val", "folds" of train and val, or "train", each row left out
        n : number of held-out images
        nearly_as_good : lowest and highest l2 that was tried and whose log loss is at most 1 % above the lowest, or None
    """
    if path.selected_on is None:
        return None
    losses = {point["l2"]: point["val_log_loss"] for point in path.points if "val_log_loss" in point}
    near = [l2 for l2, loss in losses.items() if loss <= FLAT * min(losses.values())]
    by_accuracy = config.selection == "accuracy" or (config.solver == "ridge" and config.task == "single")
    return {
        "by": "rmse" if config.task == "regression" else "accuracy" if by_accuracy else "log loss",
        "on": path.selected_on,
        "n": len(path.losses) or None,
        "nearly_as_good": [min(near), max(near)] if near else None,
    }


def _warn_at_edge(path: L2Path) -> None:
    """Warn if the best l2 is the smallest or the largest of the grid."""
    from embedpipe.heads import L2_GRID

    first, last = min(L2_GRID), max(L2_GRID)
    if path.l2 is not None and path.l2 in (first, last):
        direction, further = ("smaller", path.l2 / 10) if path.l2 == first else ("larger", path.l2 * 10)
        warn(
            f"the best l2, {path.l2:g}, is at the edge of the values that were tried: a {direction} one may be better, "
            f"see --l2 {further:g}"
        )


def _predict(features: FeatureSet, head: Any, config: HeadConfig) -> dict[str, Scored]:
    """Return the predictions of the labelled samples of each split."""
    from embedpipe.classifier import Scored

    return {
        split: Scored(samples, head.predict_proba(config.rows(features, samples)), config.task)
        for split, samples in ((split, features.samples(split, labelled=True)) for split in features.splits)
    }


def _learning_curve(
    features: FeatureSet, config: HeadConfig, scored: dict[str, Scored], *, points: Any, **options: int
) -> list[dict[str, Any]]:
    """Return the accuracy of heads on random subsets of train, on each other split."""
    from embedpipe.selection import learning_curve

    arrays: dict[str, Any] = {
        split: (config.rows(features, part.samples), part.labels(features.classes)) for split, part in scored.items()
    }
    return learning_curve(config, points, arrays.pop("train"), arrays, **options)


def _cross_validate(features: FeatureSet, config: HeadConfig, views: Any, folds: int, seed: int) -> dict[str, Any]:
    """Cross-validate over train and val: accuracy over all samples with its interval, and of each fold."""
    from embedpipe.evaluation import wilson_interval
    from embedpipe.selection import predict_out_of_fold

    result = predict_out_of_fold(features, config, folds=folds, seed=seed, views=bool(views and views["used"]))
    correct = result.probabilities.argmax(axis=1) == result.labels
    parts = [correct[result.fold == number] for number in range(folds)]
    per_fold = [
        {"n": len(part), "accuracy": float(part.mean()), "l2": l2} for part, l2 in zip(parts, result.l2, strict=True)
    ]
    n, count = len(correct), int(correct.sum())
    interval = list(wilson_interval(count, n))
    return {"k": folds, "n": n, "accuracy": count / n, "accuracy_ci95": interval, "per_fold": per_fold}

"""fit_head: a linear head on cached features, chosen on validation, in seconds.

>>> classifier = fit_head(features)
>>> classifier.report["metrics"]["test"]["accuracy"]
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeWarning, UsageError

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.classifier import Classifier
    from embedpipe.features import FeatureSet
    from embedpipe.heads import KnnHead, LinearHead
    from embedpipe.heads import Path as HeadPath

PathLike = str | os.PathLike[str]


def fit_head(
    features: FeatureSet | str | None = None,
    *,
    solver: Literal["auto", "newton", "lbfgs", "sklearn", "ridge", "knn"] = "auto",
    l2: float | Literal["auto"] = "auto",
    refit: bool = False,
    calibrate: bool = False,
    standardize: bool = True,
    class_weight: Literal["none", "balanced"] = "none",
    space: tuple[str, ...] | str = (),
    backbone: tuple[str, ...] | str = (),
    layer: tuple[str, ...] | str = (),
    compare_layers: bool = False,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    seed: int = 0,
) -> Classifier:
    """Fit a head on the train split, choose l2 on val, and score test once.

    The objective is mean cross-entropy + l2/2 * ||W||^2 on standardised features, bias free.

    Parameters
    ----------
    features : FeatureSet, or name, id or path of a data set
        Default: the data set extracted last.
    solver : str
        newton (auto), lbfgs and sklearn solve the same objective; ridge fits least squares, in the least time; knn asks the
        nearest training images.
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
    UsageError          nothing extracted, no labels, fewer than two classes, no validation samples; calibrate with
                        refit (val is fitted on then) or without a linear head
    NonFiniteFeatures   NaN or inf in the features
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, Reference, Scored, save_run
    from embedpipe.features import FeatureSet, open_features
    from embedpipe.runs import new_run
    from embedpipe.scoring import calibrated

    start = time.monotonic()
    asked: dict[str, Any] = {"space": space, "backbone": backbone, "layer": layer, "every": compare_layers}
    if not isinstance(features, FeatureSet):
        features = open_features(Cache(Path(cache_dir)), features, **asked)
    elif any(asked.values()):
        features = features.reopened(**asked)
    _check(features)
    options: dict[str, Any] = {"l2": l2, "standardize": standardize, "class_weight": class_weight}
    features, choice = _choose(features, compare_layers, solver=solver, **options)
    fit = _fit_knn if solver == "knn" else _fit_linear
    head, fitted = fit(features, solver=solver, refit=refit, **options)
    if calibrate:
        head, fitted = calibrated(head, features, unseen_val=not refit), {**fitted, "chosen_on": "val"}
    classifier = Classifier(head, Reference.of(features.spaces), _backbone=features.backbone)
    scored = {}
    for split in features.splits:
        samples = features.samples(split, labelled=True)
        scored[split] = Scored(samples, head.predict_proba(features.read(samples)))
    report = {"dataset": features.dataset, **fitted, "classes": list(features.classes), "leaks": find_leaks(features)}
    report |= choice
    if choice:
        report["chosen_on"] = "val"
    with new_run(Path(runs_dir), "fit-head") as run:
        seconds = time.monotonic() - start
        return save_run(run, "fit-head", classifier, features, scored, report, seconds=seconds)


def _choose(features: FeatureSet, compare: bool, **options: Any) -> tuple[FeatureSet, dict[str, Any]]:
    """Return the features of the spaces that val chooses, and what there is to tell of the choice.

    Raises
    ------
    UsageError    a kNN head, or no validation samples, where there is a choice
    """
    from embedpipe.ranking import choose_blocks, choose_space

    if not (compare or features.beside):
        return features, {}
    if options["solver"] == "knn":
        raise UsageError("--solver knn takes one space", hint="name one --layer, or fit a linear head")
    if "val" not in features.splits:
        raise UsageError(
            f"{features.manifest.name} has no validation samples to choose layers on",
            hint="name one --layer, or add val/ images",
        )
    chosen = (choose_space if compare else choose_blocks)(features, lambda some: _fit_path(some, **options))
    return chosen.features, chosen.report


def _fit_knn(features: FeatureSet, **_: Any) -> tuple[KnnHead, dict[str, Any]]:
    from embedpipe.heads import fit_knn

    X, y = features.arrays("train")
    head = fit_knn(X, y, classes=features.classes)
    return head, {"solver": "knn", "l2": None, "l2_path": [], "n_train": len(y), "chosen_on": None}


def _fit_linear(
    features: FeatureSet, *, solver: str, l2: float | str, refit: bool, standardize: bool, class_weight: str
) -> tuple[LinearHead, dict[str, Any]]:
    """Fit the path over l2, choose on validation, and say what came of it."""
    import numpy as np

    from embedpipe.heads import fit_blocks_once

    path = _fit_path(features, solver=solver, l2=l2, standardize=standardize, class_weight=class_weight)
    head, (X, y) = path.head, features.arrays("train")
    if refit and "val" in features.splits:
        X_val, y_val = features.arrays("val")
        X, y = np.concatenate([X, X_val]), np.concatenate([y, y_val])
        options = _options(features, y, solver=solver, standardize=standardize, class_weight=class_weight)
        head = fit_blocks_once(X, y, l2=path.l2, **options)
    points = [{"l2": p.l2, "val_accuracy": p.val_accuracy, "objective": p.objective} for p in path.points]
    solved = head.provenance["solver"]
    chosen_on = "val" if len(points) > 1 or refit else None
    fitted = {"solver": solved, "l2": path.l2, "l2_path": points, "n_train": len(y), "refit": refit}
    return head, {**fitted, "chosen_on": chosen_on}


def _fit_path(features: FeatureSet, *, l2: float | str, **options: Any) -> HeadPath:
    from embedpipe.heads import fit_blocks

    X, y = features.arrays("train")
    X_val, y_val = features.arrays("val") if "val" in features.splits else (X[:0], y[:0])
    if l2 == "auto" and not len(y_val):
        raise UsageError(
            f"{features.manifest.name} has no validation samples to choose l2 on",
            hint="name one with --l2, or add val/ images",
        )
    return fit_blocks(X, y, X_val, y_val, l2=l2, **_options(features, y, **options))


def _options(
    features: FeatureSet, y: np.ndarray, *, solver: str, standardize: bool, class_weight: str
) -> dict[str, Any]:
    from embedpipe.heads import class_weights

    weight = class_weights(y, len(features.classes))[y] if class_weight == "balanced" else None
    common = {"classes": features.classes, "solver": solver, "standardize": standardize}
    return {**common, "widths": features.widths, "sample_weight": weight}


def _check(features: FeatureSet) -> None:
    """Refuse what no head can be fitted on, in the user's words."""
    name = features.manifest.name
    if not features.manifest.labelled:
        raise UsageError(
            f"{name} has no labels, expected class folders or a manifest with a label column",
            hint="sort the images into one folder a class",
        )
    if features.missing:
        raise UsageError(
            f"{features.missing} of {len(features.manifest.samples)} images of {name} have no features in "
            f"{features.space.folder.name}",
            hint=f"run `embedpipe extract {features.manifest.sources[0].argument}` again",
        )
    found = sorted({sample.label or "" for sample in features.samples("train", labelled=True)})
    if len(found) < 2:
        raise UsageError(
            f"the train split of {name} has {len(found)} class ({', '.join(found) or 'none'}), expected at least 2",
            hint="add a folder of images for every other class",
        )
    lacking = [name for name in features.classes if name not in found]
    if lacking:
        warnings.warn(
            f"no training image of {', '.join(lacking)}: the head will never answer so", EmbedpipeWarning, stacklevel=3
        )


def find_leaks(features: FeatureSet) -> dict[str, Any]:
    """Count the images of val and test whose very content is in train too."""
    train = {sample.key for sample in features.samples("train")}
    others = Counter(sample.split for sample in features.samples() if sample.split != "train" and sample.key in train)
    return {"duplicates_of_train": {split: others.get(split, 0) for split in features.splits if split != "train"}}

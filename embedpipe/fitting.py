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
    from embedpipe.classifier import Classifier
    from embedpipe.features import FeatureSet
    from embedpipe.heads import KnnHead, LinearHead

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
    space: str | None = None,
    backbone: str | None = None,
    layer: str | None = None,
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
    space : str
        Which space, when the data set has features in several: its folder's name or a prefix.
    backbone : str
        Take the space of this backbone.
    layer : str
        Take the space of this layer.

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
    if not isinstance(features, FeatureSet):
        asked = {"space": space, "backbone": backbone, "layer": layer}
        features = open_features(Cache(Path(cache_dir)), features, **asked)
    _check(features)
    options: dict[str, Any] = {"l2": l2, "refit": refit, "standardize": standardize, "class_weight": class_weight}
    fit = _fit_knn if solver == "knn" else _fit_linear
    head, fitted = fit(features, solver=solver, **options)
    if calibrate:
        head, fitted = calibrated(head, features, unseen_val=not refit), {**fitted, "chosen_on": "val"}
    classifier = Classifier(head, Reference(features.space.spec, features.loader), _backbone=features.backbone)
    scored = {}
    for split in features.splits:
        samples = features.samples(split, labelled=True)
        scored[split] = Scored(samples, head.predict_proba(features.read(samples)))
    report = {"dataset": features.dataset, **fitted, "classes": list(features.classes), "leaks": find_leaks(features)}
    with new_run(Path(runs_dir), "fit-head") as run:
        seconds = time.monotonic() - start
        return save_run(run, "fit-head", classifier, features, scored, report, seconds=seconds)


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

    from embedpipe.heads import class_weights, fit_linear, fit_path

    def options(y: np.ndarray) -> dict[str, Any]:
        balanced = class_weight == "balanced"
        weight = class_weights(y, len(features.classes))[y] if balanced else None
        common = {"classes": features.classes, "solver": solver, "standardize": standardize}
        return {**common, "sample_weight": weight}

    X, y = features.arrays("train")
    X_val, y_val = features.arrays("val") if "val" in features.splits else (X[:0], y[:0])
    if l2 == "auto" and not len(y_val):
        raise UsageError(
            f"{features.manifest.name} has no validation samples to choose l2 on",
            hint="name one with --l2, or add val/ images",
        )
    path = fit_path(X, y, X_val, y_val, l2=l2, **options(y))
    head = path.head
    if refit:
        X, y = np.concatenate([X, X_val]), np.concatenate([y, y_val])
        head = fit_linear(X, y, l2=path.l2, **options(y))
    points = [{"l2": p.l2, "val_accuracy": p.val_accuracy, "objective": p.objective} for p in path.points]
    solved = head.provenance["solver"]
    chosen_on = "val" if len(points) > 1 or refit else None
    fitted = {"solver": solved, "l2": path.l2, "l2_path": points, "n_train": len(y), "refit": refit}
    return head, {**fitted, "chosen_on": chosen_on}


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

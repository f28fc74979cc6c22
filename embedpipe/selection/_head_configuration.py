"""Head configuration: the options that shape a head, shared by the head of a run, learning curves and cross-validation.

>>> config = HeadConfig(("cat", "dog"), l2="auto")
>>> path = config.select(X, y, X_val, y_val)
>>> config.fit(X, y, l2=path.l2).predict_proba(X_test)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedpipe.data import label_names
from embedpipe.errors import UsageError, warn
from embedpipe.heads import (
    L2_GRID,
    SELECT,
    TEMPERATURE,
    Features,
    Fold,
    Int64,
    K,
    KnnHead,
    L2Path,
    LinearHead,
    class_weights,
    fit_knn,
    fit_linear,
    fit_path,
    select_knn,
    stack_rows,
)
from embedpipe.selection._fold_assignment import content_groups, needs_folds, selection_folds
from embedpipe.selection._views import Views, training_rows

if TYPE_CHECKING:
    from embedpipe.data import Sample
    from embedpipe.features import FeatureSet

Array = NDArray[Any]
CLASS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True)
class HeadConfig:
    """How to fit a head; the parameters are those of `fit_head`.

    Parameters
    ----------
    classes : C names
    task : str               "single", "multilabel" or "regression", as in the manifest
    widths : tuple of int    number of features of each space, in column order; empty for one space
    block_weights : tuple of float    of each space, relative to each other; empty if all are the same
    max_bytes : float        memory limit of fitting; larger feature sets are read in chunks
    selection : str          "log-loss" or "accuracy" on held-out rows
    k, temperature           of kNN; None selects them by the log loss
    grid : tuple of float    the l2 that are searched

    Raises
    ------
    UsageError    unknown `class_weight` or `selection`
    """

    classes: tuple[str, ...]
    solver: str = "auto"
    l2: float | str = "auto"
    standardize: bool = True
    class_weight: str = "none"
    widths: tuple[int, ...] = ()
    max_bytes: float = math.inf
    task: str = "single"
    selection: str = "log-loss"
    k: int | None = None
    temperature: float | None = None
    block_weights: tuple[float, ...] = ()
    grid: tuple[float, ...] = L2_GRID

    def __post_init__(self) -> None:
        if self.selection not in SELECT:
            raise UsageError(f"select is {self.selection!r}, expected {' or '.join(SELECT)}")
        if self.class_weight not in CLASS_WEIGHTS:
            raise UsageError(f"class_weight is {self.class_weight!r}, expected {' or '.join(CLASS_WEIGHTS)}")

    def check_knn_options(self) -> None:
        """Raise UsageError for options that a kNN head does not use, or that only such a head uses."""
        if self.solver != "knn" and (self.k is not None or self.temperature is not None):
            option = "--k" if self.k is not None else "--temperature"
            raise UsageError(f"{option} is for --solver knn, got --solver {self.solver}", hint=f"leave out {option}")
        unused = {
            "--select": self.selection != SELECT[0],
            "--l2": self.l2 != "auto",
            "--class-weight": self.class_weight != "none",
            "--no-standardize": not self.standardize,
        }
        if self.solver == "knn" and any(unused.values()):
            option = next(name for name, is_set in unused.items() if is_set)
            raise UsageError(
                f"--solver knn does not use {option}", hint=f"leave out {option}, or choose another solver"
            )

    @property
    def selects_l2(self) -> bool:
        """Whether l2 is selected from the grid."""
        return self.solver != "knn" and self.l2 == "auto"

    @property
    def selects(self) -> bool:
        """Whether anything is selected: l2, or k and the temperature of kNN."""
        return self.selects_l2 or (self.solver == "knn" and None in (self.k, self.temperature))

    @property
    def uses_views(self) -> bool:
        """Whether heads may be fitted on views: those that minimise a log loss."""
        return self.solver not in ("knn", "ridge") and self.task != "regression"

    def uses_folds(self, y_val: Array) -> bool:
        """Whether folds of train and val select: val has too few images for the log loss, or none at all."""
        has_loo = self.solver == "ridge" or self.task == "regression"  # leave-one-out scores instead of those of val
        small = needs_folds(y_val, len(self.classes)) if self.selection == "log-loss" else not len(y_val)
        return self.selects and not has_loo and small

    def arrays(self, features: FeatureSet, *splits: str) -> tuple[Features, Array]:
        """Return X (N, D) and y (N,) or (N, C) of the labelled images of some splits."""
        return features.labelled(*splits, max_bytes=self.max_bytes)

    def rows(self, features: FeatureSet, samples: tuple[Sample, ...]) -> Any:
        """Return the features (N, D) of samples."""
        return features.rows(samples, max_bytes=self.max_bytes)

    def select_on(self, features: FeatureSet, *, views: Views | None = None) -> L2Path:
        """Fit a head on train, and select l2 (of kNN: k and the temperature) on val, or on folds of train and val."""
        train, val = self.arrays(features, "train"), self.arrays(features, "val")
        group = None
        if self.uses_folds(val[1]):
            group = content_groups([s for split in ("train", "val") for s in features.labelled_samples(split)])
        return self.select(*train, *val, group=group, views=views)

    def select(
        self,
        X: Features,
        y: Array,
        X_val: Features,
        y_val: Array,
        *,
        group: Int64 | None = None,
        views: Views | None = None,
    ) -> L2Path:
        """Fit a head on X, y, with the l2 that scores best on X_val, y_val, or on folds of both if val has few images.

        Parameters
        ----------
        X : float32 (N, D)
        y : int64 (N,), or float (N, C) for several labels, or float (N,) for regression
        group : int64 (N + n,), optional    of the rows of X and X_val: those of one number stay in one fold
        views : optional                    additions to the rows of X; not for kNN

        Returns
        -------
        Path
            With one point for a fixed l2; for kNN without points, l2 is None.

        Raises
        ------
        UsageError    fewer than two classes, or no validation samples to select l2 on
        """
        folds: Sequence[Fold] = ()
        if self.uses_folds(y_val):
            folds = selection_folds(
                stack_rows(X, X_val),
                np.concatenate([y, y_val]),
                np.arange(len(y) + len(y_val)) if group is None else group,
                views=views,
                weigh=self._weigh,
                max_bytes=self.max_bytes,
            )
        if self.solver == "knn":
            return self._select_knn(X, y, folds or ([Fold(X, y, X_val, y_val)] if len(y_val) else ()), bool(folds))
        rows, options = self._training(X, y, views)
        return fit_path(*rows, X_val, y_val, l2=self.l2, grid=self.grid, select=self.selection, folds=folds, **options)

    def _select_knn(self, X: Features, y: Array, folds: Sequence[Fold], several: bool) -> L2Path:
        """Return a kNN head with the k and temperature that are given, or best on held-out rows."""
        self._check_knn_task()
        k, temperature, losses = select_knn(folds, len(self.classes), k=self.k, temperature=self.temperature)
        selected_on = ("folds" if several else "val") if self.selects and folds else None
        head = fit_knn(X[:], y, classes=self.classes, k=k, temperature=temperature)
        return L2Path(head, None, losses=losses, selected_on=selected_on)

    def fit(self, X: Features, y: Array, *, l2: float | None, views: Views | None = None) -> LinearHead | KnnHead:
        """Fit a head on X, y and views with a fixed l2; None for kNN."""
        if self.solver == "knn" or l2 is None:
            self._check_knn_task()
            return fit_knn(X[:], y, classes=self.classes, k=self.k or K, temperature=self.temperature or TEMPERATURE)
        rows, options = self._training(X, y, views)
        return fit_linear(*rows, l2=l2, **options)

    def refit(self, X: Features, y: Array, path: L2Path, views: Views | None = None) -> LinearHead | KnnHead:
        """Fit on X, y and views with what a path selected."""
        if isinstance(path.head, KnnHead):
            return replace(self, k=path.head.k, temperature=path.head.temperature).fit(X, y, l2=None)
        return self.fit(X, y, l2=path.l2, views=views)

    def _check_knn_task(self) -> None:
        if self.task != "single":
            raise UsageError(f"the solver knn does not support {self.task} targets", hint="leave out --solver knn")

    def _weigh(self, y: Array) -> Array | None:
        """Return the weights of images, or None if all are the same."""
        return class_weights(y, len(self.classes))[y] if self.class_weight == "balanced" else None

    def _training(self, X: Features, y: Array, views: Views | None) -> tuple[tuple[Features, Array], dict[str, Any]]:
        """Return rows and targets to fit on, and the options of the fit."""
        X, y, sample_weight = training_rows(X, y, views, self._weigh(y))
        return (X, y), {
            "classes": self.classes,
            "task": self.task,
            "solver": self.solver,
            "standardize": self.standardize,
            "widths": self.widths or (X.shape[1],),
            "block_weights": self.block_weights,
            "sample_weight": sample_weight,
            "memory_bytes": max(1.0, self.max_bytes / 4),
        }


def check_labelled(features: FeatureSet) -> None:
    """Raise UsageError for a data set without labels or with missing features."""
    name = features.manifest.name
    if not features.manifest.labelled:
        message = f"{name} has no labels, expected class folders or a manifest with a column label, labels or target"
        raise UsageError(message, hint="sort the images into one folder per class")
    if features.missing:
        raise UsageError(
            f"{features.missing} of {len(features.manifest.samples)} images of {name} have no features in "
            f"{features.space.folder.name}",
            hint=f"run `embedpipe extract {features.manifest.sources[0].argument}` again",
        )


def check_task(features: FeatureSet, *options: str) -> None:
    """Raise UsageError for options (as typed) that need a single class per image where the task is another."""
    if options and features.manifest.task != "single":
        raise UsageError(
            f"{features.manifest.name} has {features.manifest.task} targets, but {options[0]} needs one class per image",
            hint=f"leave out {options[0]}",
        )


def check_classes(features: FeatureSet) -> None:
    """Raise UsageError for a train split without two different targets; warn about classes without training images."""
    name, task = features.manifest.name, features.manifest.task
    labels = {sample.label or "" for sample in features.samples("train", labelled=True)}
    if not labels:
        raise UsageError(f"the train split of {name} has no images", hint="move images into train/")
    if task != "single" and len(labels) < 2:
        message = f"all images in the train split of {name} have the same target, expected at least 2 different ones"
        raise UsageError(message, hint="add images with another target")
    if task == "regression":
        return
    present = sorted({part for label in labels for part in label_names(label, task)})
    if task == "single" and len(present) < 2:
        raise UsageError(
            f"the train split of {name} has {len(present)} class ({', '.join(present) or 'none'}), expected at least 2",
            hint="add a folder of images for every other class",
        )
    absent = [name for name in features.classes if name not in present]
    if absent:
        warn(f"no training images for class {', '.join(absent)}: it will never be predicted")

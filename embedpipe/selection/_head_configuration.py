"""Head configuration: the options that shape a head, shared by the head of a run, learning curves and cross-validation.

>>> config = HeadConfig(("cat", "dog"), l2="auto")
>>> path = config.select(X, y, X_val, y_val)
>>> config.fit(X, y, l2=path.l2).predict_proba(X_test)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from embedpipe.data import label_names
from embedpipe.errors import UsageError, warn
from embedpipe.heads import Features, Gram, KnnHead, L2Path, LinearHead, class_weights, fit_knn, fit_linear, fit_path

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
    max_bytes : float        memory limit of fitting; larger feature sets are read in chunks

    Raises
    ------
    UsageError    unknown `class_weight`
    """

    classes: tuple[str, ...]
    solver: str = "auto"
    l2: float | str = "auto"
    standardize: bool = True
    class_weight: str = "none"
    widths: tuple[int, ...] = ()
    max_bytes: float = math.inf
    task: str = "single"

    def __post_init__(self) -> None:
        if self.class_weight not in CLASS_WEIGHTS:
            raise UsageError(f"class_weight is {self.class_weight!r}, expected {' or '.join(CLASS_WEIGHTS)}")

    def check_knn_options(self) -> None:
        """Raise UsageError for options that a kNN head does not use."""
        unused = {
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

    def arrays(self, features: FeatureSet, *splits: str) -> tuple[Features, Array]:
        """Return X (N, D) and y (N,) or (N, C) of the labelled images of some splits."""
        return features.labelled(*splits, max_bytes=self.max_bytes)

    def rows(self, features: FeatureSet, samples: tuple[Sample, ...]) -> Any:
        """Return the features (N, D) of samples."""
        return features.rows(samples, max_bytes=self.max_bytes)

    def gram(self, X: Features, y: Array, *, origin: Array | None = None) -> Gram | None:
        """Return the Gram matrix that several ridge fits share, or None where no fit uses one."""
        used = self.solver == "ridge" and self.task == "single" and self.class_weight == "none"
        return Gram.from_rows(X, y, len(self.classes), origin) if used and len(self.widths) < 2 else None

    def select(self, X: Features, y: Array, X_val: Features, y_val: Array, *, gram: Gram | None = None) -> L2Path:
        """Fit a head for each l2 on X, y and select the one that scores best on X_val, y_val.

        Parameters
        ----------
        X : float32 (N, D)
        y : int64 (N,), or float (N, C) for several labels, or float (N,) for regression

        Returns
        -------
        Path
            With one point for a fixed l2; for kNN without points, l2 is None.

        Raises
        ------
        UsageError    fewer than two classes, or no validation samples to select l2 on
        """
        if self.solver == "knn":
            return L2Path(self.fit(X, y, l2=None), None, ())
        return fit_path(X, y, X_val, y_val, l2=self.l2, gram=gram, **self._options(X, y))

    def fit(self, X: Features, y: Array, *, l2: float | None, gram: Gram | None = None) -> LinearHead | KnnHead:
        """Fit a head on X, y with a fixed l2; None for kNN."""
        if self.solver == "knn" or l2 is None:
            if self.task != "single":
                raise UsageError(f"the solver knn does not support {self.task} targets", hint="leave out --solver knn")
            return fit_knn(X[:], y, classes=self.classes)
        return fit_linear(X, y, l2=l2, gram=gram, **self._options(X, y))

    def _options(self, X: Features, y: Array) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "task": self.task,
            "solver": self.solver,
            "standardize": self.standardize,
            "widths": self.widths or (X.shape[1],),
            "sample_weight": class_weights(y, len(self.classes))[y] if self.class_weight == "balanced" else None,
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

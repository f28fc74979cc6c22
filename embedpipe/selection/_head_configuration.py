"""Recipe: how a head is fitted, the same for the head of a run, for a point of a learning curve and for a fold.

>>> recipe = Recipe(("cat", "dog"), l2="auto")
>>> fitted = recipe.choose(X, y, X_val, y_val)
>>> recipe.fit(X, y, l2=fitted.l2).predict_proba(X_test)
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from embedpipe.data import names_of
from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.heads import (
    MEMORY_BYTES,
    Chunked,
    Gram,
    KnnHead,
    LinearHead,
    Path,
    PathPoint,
    class_weights,
    fit_blocks,
    fit_blocks_once,
    fit_knn,
)

if TYPE_CHECKING:
    from embedpipe.data import Sample
    from embedpipe.features import FeatureSet

Array = NDArray[Any]
CLASS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A head, its l2 (None for knn) and the points of the path that it was chosen from."""

    head: LinearHead | KnnHead
    l2: float | None
    points: tuple[PathPoint, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """The options of fit-head that shape a head; the deed explains them.

    task : str               what the head is to learn, as in a manifest
    widths : tuple of int    features of each space, side by side; one space where there are none
    max_bytes : float        that fitting may take; features that need more are read in chunks
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
        """Refuse what would be taken for something else.

        Raises
        ------
        UsageError    a weighting of classes that there is not
        """
        if self.class_weight not in CLASS_WEIGHTS:
            raise UsageError(f"class_weight {self.class_weight!r}, expected {' or '.join(CLASS_WEIGHTS)}")

    @property
    def chooses(self) -> bool:
        """Whether there is an l2 to choose."""
        return self.solver != "knn" and self.l2 == "auto"

    @property
    def needs_val(self) -> bool:
        """Whether validation samples are needed, to choose l2 on; ridge asks what it misses of each sample left out."""
        return self.chooses and self.solver != "ridge" and self.task != "regression"

    @property
    def _most(self) -> float:
        return math.inf if self.solver == "knn" else self.max_bytes

    @property
    def _memory(self) -> int:
        return int(min(MEMORY_BYTES, max(1.0, self.max_bytes / 4)))

    def data(self, features: FeatureSet, *splits: str) -> tuple[Array | Chunked, Array]:
        """Return X (N, D) and y (N,), or (N, C), of the labelled images of splits."""
        return features.labelled(*splits, max_bytes=self._most)

    def rows(self, features: FeatureSet, samples: tuple[Sample, ...]) -> Any:
        """Return the features (N, D) of samples."""
        return features.rows(samples, max_bytes=self._most)

    def gram(self, X: Array | Chunked, y: Array, *, origin: Array | None = None) -> Gram | None:
        """Return the Gram of rows that several fits share, for `choose` and `fit`; None where it would not be asked for."""
        asked = self.solver == "ridge" and self.task == "single" and self.class_weight == "none"
        return Gram.of(X, y, len(self.classes), origin) if asked and len(self.widths) < 2 else None

    def choose(
        self, X: Array | Chunked, y: Array, X_val: Array | Chunked, y_val: Array, *, gram: Gram | None = None
    ) -> Fitted:
        """Fit on X, y with the l2 that is best on X_val, y_val, or with the one that was named.

        X : float32 (N, D); y : as `FeatureSet.arrays` gives it

        Raises
        ------
        UsageError    fewer than two classes, or nothing to choose l2 on
        """
        if self.solver == "knn":
            return Fitted(self._neighbours(X, y), None)
        path = self.path(X, y, X_val, y_val, gram=gram)
        return Fitted(path.head, path.l2, path.points)

    def path(
        self, X: Array | Chunked, y: Array, X_val: Array | Chunked, y_val: Array, *, gram: Gram | None = None
    ) -> Path:
        """Fit a linear head for every l2, as `choose` does."""
        return fit_blocks(X, y, X_val, y_val, l2=self.l2, gram=gram, **self._options(X, y))

    def fit(self, X: Array | Chunked, y: Array, *, l2: float | None, gram: Gram | None = None) -> LinearHead | KnnHead:
        """Fit on X, y with this l2."""
        if self.solver == "knn" or l2 is None:
            return self._neighbours(X, y)
        return fit_blocks_once(X, y, l2=l2, gram=gram, **self._options(X, y))

    def _neighbours(self, X: Array | Chunked, y: Array) -> KnnHead:
        if self.task != "single":
            raise UsageError(f"the solver knn knows no {self.task} targets", hint="leave out --solver knn")
        return fit_knn(X[:], y, classes=self.classes)

    def _options(self, X: Array | Chunked, y: Array) -> dict[str, Any]:
        weight = class_weights(y, len(self.classes))[y] if self.class_weight == "balanced" else None
        common = {"classes": self.classes, "task": self.task, "solver": self.solver, "standardize": self.standardize}
        return {**common, "widths": self.widths or (X.shape[1],), "sample_weight": weight, "memory_bytes": self._memory}


def check_labelled(features: FeatureSet) -> None:
    """Refuse data without labels and data that are not extracted whole, in the user's words."""
    name = features.manifest.name
    if not features.manifest.labelled:
        raise UsageError(
            f"{name} has no labels, expected class folders or a manifest with a column label, labels or target",
            hint="sort the images into one folder a class",
        )
    if features.missing:
        raise UsageError(
            f"{features.missing} of {len(features.manifest.samples)} images of {name} have no features in "
            f"{features.space.folder.name}",
            hint=f"run `embedpipe extract {features.manifest.sources[0].argument}` again",
        )


def check_task(features: FeatureSet, *options: str) -> None:
    """Refuse options, as they are typed, that make sense only where every image has one class."""
    if options and features.manifest.task != "single":
        raise UsageError(
            f"{features.manifest.name} has {features.manifest.task} targets, {options[0]} needs one class an image",
            hint=f"do without {options[0]}",
        )


def check_neighbours(recipe: Recipe) -> None:
    """Refuse options, as they are typed, that a kNN head has no use for."""
    idle = {
        "--l2": recipe.l2 != "auto",
        "--class-weight": recipe.class_weight != "none",
        "--no-standardize": not recipe.standardize,
    }
    if recipe.solver == "knn" and any(idle.values()):
        option = next(name for name, given in idle.items() if given)
        raise UsageError(f"--solver knn has no use for {option}", hint=f"leave out {option}, or take another solver")


def check_classes(features: FeatureSet) -> None:
    """Refuse a train split without two classes, labels or numbers; warn of classes that it lacks."""
    name, task = features.manifest.name, features.manifest.task
    labels = {sample.label or "" for sample in features.samples("train", labelled=True)}
    if not labels:
        raise UsageError(f"the train split of {name} has no images", hint="move images into train/")
    if task != "single" and len(labels) < 2:
        raise UsageError(
            f"the train split of {name} has the same target everywhere, expected at least 2",
            hint="add images with another one",
        )
    if task == "regression":
        return
    found = sorted({one for label in labels for one in names_of(label, task)})
    if task == "single" and len(found) < 2:
        raise UsageError(
            f"the train split of {name} has {len(found)} class ({', '.join(found) or 'none'}), expected at least 2",
            hint="add a folder of images for every other class",
        )
    lacking = [name for name in features.classes if name not in found]
    if lacking:
        warnings.warn(
            f"no training image of {', '.join(lacking)}: the head will never answer so", EmbedpipeWarning, stacklevel=3
        )

"""predict: labels and probabilities of images; features in the cache are not computed again.

>>> predict("20260101-120000-fit-head-0a1b2c", ["photos/"]).predictions[0].label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.classifier import Classifier
    from embedpipe.data import Failure
    from embedpipe.inference import Progress


@dataclass(frozen=True)
class Prediction:
    """The prediction of one image.

    values : float64 (C,)          probabilities in the order of `classes`; regression: the number (1,)
    label : str                    most probable class; several labels: those with a probability of at least 0.5, joined by
                                   "|"; regression: the number
    probability : float or None    of the class, or of the least probable of several labels; None without label and for numbers
    """

    path: str
    classes: tuple[str, ...]
    values: np.ndarray
    task: str = "single"

    @property
    def label(self) -> str:
        from embedpipe.classifier import answer

        return answer(self.values, self.classes, self.task)[0]

    @property
    def probability(self) -> float | None:
        from embedpipe.classifier import answer

        return answer(self.values, self.classes, self.task)[1]

    @property
    def value(self) -> float:
        """The predicted number of a regression head."""
        return float(self.values[0])

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the `count` most probable classes with their probabilities."""
        pairs = zip(self.classes, map(float, self.values), strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])[:count]

    def to_dict(self, *, top: int = 1, probabilities: bool = False) -> dict[str, Any]:
        from embedpipe.data import label_names

        if self.task == "regression":
            return {"path": self.path, "value": self.value}
        record: dict[str, Any] = {"path": self.path, "label": self.label, "probability": self.probability}
        if self.task == "multilabel":
            record["labels"] = list(label_names(self.label, self.task))
        if top > 1:
            record["top"] = [{"label": name, "probability": p} for name, p in self.top(top)]
        if probabilities:
            record["probabilities"] = dict(zip(self.classes, map(float, self.values), strict=True))
        return record


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the images, the images that failed, and the task of the head."""

    predictions: list[Prediction]
    failed: tuple[Failure, ...]
    task: str = "single"


def predict(
    run: Classifier | PathLike,
    images: PathLike | Sequence[PathLike],
    *,
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
    workers: int | Literal["auto"] = "auto",
    views: int = 0,
    strict: bool = False,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    progress: Progress | None = None,
) -> Predictions:
    """Predict image files and all images in folders.

    A head of several labels per image returns the labels with a probability of at least 0.5, joined by `|`, and the lowest of
    these probabilities. A regression head returns the number.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run of fit-head or finetune
    images : path or several
    batch_size : int or auto
        Images per forward pass.
    device : str
        auto, cpu, cuda, cuda:K or mps.
    workers : int or auto
        Decoder processes.
    views : int
        Average the probabilities of each image and so many augmented views of it, which are not cached. Augmentation and seed
        are those of the run; of a run without views, standard and 0.
    strict : bool
        Exit with 1 instead of 3 if an image failed.

    Raises
    ------
    UsageError       no such run, path or image
    ModelMismatch    the weights of the backbone differ from those that the head was fitted on
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, classify
    from embedpipe.data import list_images

    if views < 0:
        raise UsageError(f"--views is {views}, expected 0 or more")
    run = Classifier.of(run, runs_dir)
    machine: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers, "progress": progress}
    found = classify(run, list_images(images), cache=Cache(Path(cache_dir)), strict=strict, views=views, **machine)
    paths, probabilities, failed = found
    rows = zip(paths, probabilities, strict=True)
    return Predictions([Prediction(path, run.classes, row, run.task) for path, row in rows], failed, run.task)

"""predict: labels and probabilities for images; what the cache knows is not computed again.

>>> predict("20260101-120000-fit-head-0a1b2c", ["photos/"]).predictions[0].label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.storage import PathLike

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.classifier import Classifier
    from embedpipe.data import Failure
    from embedpipe.inference import Progress


@dataclass(frozen=True)
class Prediction:
    """One image: what the head says, and all probabilities float64 (C,) in order of `classes`; of numbers the value (1,).

    label : str                    the most probable class; or all labels from 0.5 on, joined by "|"; or the number
    probability : float or None    of the class; of the least probable of these labels, None for none of them; None for a number
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
        """The number that was asked for."""
        return float(self.values[0])

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the `count` most probable classes with their probabilities."""
        pairs = zip(self.classes, map(float, self.values), strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])[:count]

    def to_dict(self, *, top: int = 1, probabilities: bool = False) -> dict[str, Any]:
        from embedpipe.data import names_of

        if self.task == "regression":
            return {"path": self.path, "value": self.value}
        record: dict[str, Any] = {"path": self.path, "label": self.label, "probability": self.probability}
        if self.task == "multilabel":
            record["labels"] = list(names_of(self.label, self.task))
        if top > 1:
            record["top"] = [{"label": name, "probability": p} for name, p in self.top(top)]
        if probabilities:
            record["probabilities"] = dict(zip(self.classes, map(float, self.values), strict=True))
        return record


@dataclass(frozen=True)
class Predictions:
    """predictions : list of Prediction, in the order of the images; failed : images without one; task : of the head."""

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
    strict: bool = False,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    progress: Progress | None = None,
) -> Predictions:
    """Classify image files and all images in folders.

    A head of several labels an image gives those with a probability of 0.5 and more, joined by `|`, and the least of these
    probabilities; a head of numbers gives the value.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run of fit-head or finetune
    images : path or several
    batch_size : int or auto
        Images a forward pass.
    device : str
        auto, cpu, cuda, cuda:K or mps.
    workers : int or auto
        Decoding threads.
    strict : bool
        Exit with 1, not 3, when an image failed.

    Raises
    ------
    UsageError       no such run, path or image
    ModelMismatch    the backbone's weights are not those that the head was fitted on
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, classify
    from embedpipe.data import list_images

    run = Classifier.of(run, runs_dir)
    machine: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers, "progress": progress}
    result = classify(run, list_images(images), cache=Cache(Path(cache_dir)), strict=strict, **machine)
    predictions = [
        Prediction(path, run.classes, values, run.task)
        for path, values in zip(result.paths, result.values, strict=True)
    ]
    return Predictions(predictions, result.failed, run.task)

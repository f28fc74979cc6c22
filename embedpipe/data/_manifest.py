"""Manifest: the samples of a data set.

>>> manifest.targets(manifest.samples)
array([0, 1, 0])
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from embedpipe.data._byte_source import Place
from embedpipe.data._labels import names_of
from embedpipe.data._source import Failure, Source, join

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val", "test", "all")


@dataclass(frozen=True)
class Sample:
    """One readable image.

    Parameters
    ----------
    path : str            relative to the root of its source, decoded by `os.fsdecode`
    label : str or None   class name; class names joined by "|", "|" alone for none; or a number; depending on the task
    split : str           "train", "val", "test", or "all" for unlabelled data without splits
    group : str or None   samples of one group stay in one split
    key : bytes           sha256 of the image's bytes, 32 bytes
    source : int          index into `Manifest.sources`
    part : str            where in the file it is, see `Place`; "" the whole file
    """

    path: str
    label: str | None
    split: str
    group: str | None
    key: bytes
    source: int = 0
    part: str = ""


@dataclass(frozen=True)
class Manifest:
    """The ordered samples of one data set, from one or several sources.

    Parameters
    ----------
    name : str                      readable and safe in a file name
    sources : tuple of Source
    samples : tuple of Sample       by source; those of a folder sorted by path, those of a table by row
    classes : tuple of str          sorted plainly; ("target",) for regression, () for unlabelled data
    ignored : int                   number of files that are not images
    unreadable : tuple of Failure   images without a key; not stored in the cache
    warnings : tuple of str         one line each
    task : str                      "single", "multilabel" or "regression"
    """

    name: str
    sources: tuple[Source, ...]
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    ignored: int
    unreadable: tuple[Failure, ...]
    warnings: tuple[str, ...]
    task: str = "single"

    def place_of(self, sample: Sample) -> Place:
        """Return where the bytes of a sample are."""
        return Place(join(self.sources[sample.source].root, sample.path), sample.part)

    def name_of(self, sample: Sample) -> str:
        """Return the display name of a sample: the DATA argument, its relative path, and its name in a tar or table."""
        return self.sources[sample.source].display_name(sample.path, sample.part)

    def targets(self, samples: Sequence[Sample]) -> np.ndarray[Any, Any]:
        """Return the labels of samples as numbers, see `targets`."""
        return targets(samples, self.classes, self.task)

    @cached_property
    def splits(self) -> dict[str, int]:
        """Number of samples of each split that is not empty."""
        counts = Counter(sample.split for sample in self.samples)
        return {split: counts[split] for split in SPLITS if counts[split]}

    @property
    def labelled(self) -> bool:
        return bool(self.classes)


def targets(samples: Sequence[Sample], classes: Sequence[str], task: str) -> np.ndarray[Any, Any]:
    """Return the labels of samples as numbers.

    Returns
    -------
    single        int64 (N,), index of the class, -1 if it is not in `classes`
    multilabel    float32 (N, C), 1 where the class applies, else 0
    regression    float64 (N,), NaN without a label
    """
    import numpy as np

    labels = [sample.label for sample in samples]
    if task == "regression":
        return np.array([math.nan if label is None else float(label) for label in labels], dtype=np.float64)
    index = {name: number for number, name in enumerate(classes)}
    if task == "single":
        return np.array([-1 if label is None else index.get(label, -1) for label in labels], dtype=np.int64)
    y = np.zeros((len(samples), len(classes)), dtype=np.float32)
    for row, label in zip(y, labels, strict=True):
        row[[index[name] for name in names_of(label or "", task) if name in index]] = 1
    return y

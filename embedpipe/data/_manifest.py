"""The nouns of the room: Sample, Failure and the Manifest that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from embedpipe.data._byte_source import Place
from embedpipe.data._source import Source, join
from embedpipe.data._targets import targets

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val", "test", "all")


@dataclass(frozen=True)
class Failure:
    """An image that gave no features.

    Parameters
    ----------
    path : str      the DATA argument joined with the relative path
    stage : str     "read", "decode" or "forward"
    reason : str    one line
    """

    path: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Row:
    """What a source says of one image before it is read; `split` is empty if none is named, `part` for a whole file.

    task : str    what its label is, see `_targets`
    """

    path: str
    label: str | None = None
    split: str = ""
    group: str | None = None
    part: str = ""
    task: str = "single"


@dataclass(frozen=True)
class Listing:
    """All that one source names."""

    source: Source
    rows: tuple[Row, ...]
    ignored: int = 0
    unreadable: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One readable image.

    Parameters
    ----------
    path : str            relative to the root of its source, decoded as `os.fsdecode` does
    label : str or None   class name; names joined by "|", "|" for none of them; or a number, by the task
    split : str           "train", "val", "test", or "all" for unlabelled data without splits
    group : str or None   samples of one group stay in one split
    key : bytes           sha256 of the image's bytes, 32 bytes
    source : int          index into `Manifest.sources`
    part : str            where in the file it is, as in a `Place`; "" the whole file
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
    """The ordered samples of one data set, which may come from several sources.

    Parameters
    ----------
    name : str                      readable, safe in a file name
    sources : tuple of Source
    samples : tuple of Sample       by source; folders sorted by path, tables by row
    classes : tuple of str          what a head answers, sorted plainly; empty for unlabelled data, `target` for numbers
    ignored : int                   files that are no candidates
    unreadable : tuple of Failure   files without a key; never persisted
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
        """Return the DATA argument joined with the sample's relative path, and its name in that file."""
        return name_of(self.sources[sample.source], sample)

    def targets(self, samples: Sequence[Sample]) -> np.ndarray[Any, Any]:
        """Return the labels of samples as numbers, as `targets` does."""
        return targets(samples, self.classes, self.task)

    @cached_property
    def splits(self) -> dict[str, int]:
        """Samples in each split that has any."""
        counts = Counter(sample.split for sample in self.samples)
        return {split: counts[split] for split in SPLITS if counts[split]}

    @property
    def labelled(self) -> bool:
        return bool(self.classes)


def name_of(source: Source, row: Row | Sample) -> str:
    """Return what to call an image: the DATA argument joined with its relative path, and its name in that file."""
    location, _, name = row.part.partition("/")
    return join(source.prefix, row.path) + (f"/{name.lstrip('/') or location}" if row.part else "")

"""Manifest: the samples of a data set, and the place of each image: where its bytes are, and how they are read.

>>> ByteSource("/data/shard.tar", "512+1000/cat/1.jpg").read()  # 1000 bytes of a tar member
>>> manifest.targets(manifest.samples)
array([0, 1, 0])
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from embedpipe.data._files import file_version, is_url, read_file
from embedpipe.data._hub import hub_version, read_hub_row
from embedpipe.data._labels import label_names
from embedpipe.data._parquet import read_parquet_row
from embedpipe.data._source import HUB, Failure, Source, join

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val", "test", "all")
ROW = "row "


@dataclass(frozen=True)
class ByteSource:
    """Where the bytes of one image are.

    Parameters
    ----------
    path : str    absolute path of a file, a URL, or hf:NAME[:CONFIG]/SPLIT
    part : str    where in it: "" the whole file, "OFFSET+SIZE" a range of bytes, "row GROUP:ROW COLUMN" of a Parquet file,
                  "row ROW COLUMN" of a split; optionally followed by "/NAME", which is only displayed
    """

    path: str
    part: str = ""

    @classmethod
    def from_path(cls, place: ByteSource | str | os.PathLike[str]) -> ByteSource:
        """Return that of a whole file by its path; a `ByteSource` unchanged."""
        return place if isinstance(place, ByteSource) else cls(os.path.abspath(place))

    def __str__(self) -> str:
        return f"{self.path}[{self.part}]" if self.part else self.path

    @property
    def is_remote(self) -> bool:
        """True unless it is a file of this machine."""
        return is_url(self.path) or self.path.startswith(HUB)

    @property
    def is_local_range(self) -> bool:
        """True if it is a local file or a range of its bytes, which any process can read without a library."""
        return not self.is_remote and not self.part.startswith(ROW)

    def read(self) -> bytes:
        """Return the bytes.

        Raises
        ------
        OSError       the file cannot be read, or is shorter than it was
        UsageError    a library that reads the file is not installed
        """
        location = self.part.partition("/")[0]
        if self.path.startswith(HUB):
            return read_hub_row(self.path, location)
        if location.startswith(ROW):
            version = self.version() or f"of minute {time.monotonic() // 60}"
            return read_parquet_row(self.path, version, location)
        offset, size = map(int, location.split("+")) if location else (0, -1)
        data = read_file(self.path, offset, size)
        if size >= 0 and len(data) != size:
            raise OSError("changed while reading")
        return data

    def version(self) -> str | None:
        """Return a text that changes whenever the file, URL or split does; None if there is no such text.

        Raises
        ------
        OSError    the file or server cannot be reached
        """
        return hub_version(self.path) if self.path.startswith(HUB) else file_version(self.path)


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
    part : str            where in the file it is, see `ByteSource`; "" the whole file
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

    def byte_source_of(self, sample: Sample) -> ByteSource:
        """Return where the bytes of a sample are."""
        return ByteSource(join(self.sources[sample.source].root, sample.path), sample.part)

    def display_name(self, sample: Sample) -> str:
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
        row[[index[name] for name in label_names(label or "", task) if name in index]] = 1
    return y

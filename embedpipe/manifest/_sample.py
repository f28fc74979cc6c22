"""The nouns of the room: Source, Sample, Failure and the Manifest that holds them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from embedpipe.places import Place

SPLITS = ("train", "val", "test", "all")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


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
class Source:
    """One DATA argument: as typed, and the absolute folder that its paths are relative to."""

    argument: str
    root: Path

    @property
    def is_table(self) -> bool:
        argument = Path(self.argument)
        return argument.suffix.lower() in TABLE_SUFFIXES and argument.name != self.root.name

    @property
    def prefix(self) -> str:
        """What relative paths are joined to for display: the argument, or the folder of a table."""
        return os.path.dirname(self.argument) if self.is_table else self.argument


@dataclass(frozen=True)
class Row:
    """What a source says of one image before it is read; `split` is empty if none is named."""

    path: str
    label: str | None = None
    split: str = ""
    group: str | None = None


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
    label : str or None   class name
    split : str           "train", "val", "test", or "all" for unlabelled data without splits
    group : str or None   samples of one group stay in one split
    key : bytes           sha256 of the file's bytes, 32 bytes
    source : int          index into `Manifest.sources`
    """

    path: str
    label: str | None
    split: str
    group: str | None
    key: bytes
    source: int = 0


@dataclass(frozen=True)
class Manifest:
    """The ordered samples of one data set, which may come from several sources.

    Parameters
    ----------
    name : str                      readable, safe in a file name
    sources : tuple of Source
    samples : tuple of Sample       by source; folders sorted by path, tables by row
    classes : tuple of str          sorted plainly; empty for unlabelled data
    ignored : int                   files that are no candidates
    unreadable : tuple of Failure   files without a key; never persisted
    warnings : tuple of str         one line each
    """

    name: str
    sources: tuple[Source, ...]
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    ignored: int
    unreadable: tuple[Failure, ...]
    warnings: tuple[str, ...]

    def place_of(self, sample: Sample) -> Place:
        """Return where the bytes of a sample are."""
        return Place(os.path.join(self.sources[sample.source].root, sample.path))

    def name_of(self, sample: Sample) -> str:
        """Return the DATA argument joined with the sample's relative path."""
        return os.path.join(self.sources[sample.source].prefix, sample.path)

    @cached_property
    def splits(self) -> dict[str, int]:
        """Samples in each split that has any."""
        counts = Counter(sample.split for sample in self.samples)
        return {split: counts[split] for split in SPLITS if counts[split]}

    @property
    def labelled(self) -> bool:
        return bool(self.classes)

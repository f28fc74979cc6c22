"""Source: one DATA argument, which is a folder, a file, a brace pattern of files, a URL of either, or hf:NAME.

>>> source_of("shards/train-{000..012}.tar").root
PosixPath('/home/user/shards')
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from embedpipe.data._files import is_url
from embedpipe.errors import UsageError

HUB = "hf:"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
SHARD_SUFFIXES = (".tar", ".parquet")
FILE_SUFFIXES = (*TABLE_SUFFIXES, *SHARD_SUFFIXES)
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$")
BRACES = re.compile(r"\{([^{}]*)\}")
MAX_FILES = 1_000_000  # of one brace pattern


@dataclass(frozen=True)
class Source:
    """One DATA argument.

    Parameters
    ----------
    argument : str       as the user typed it
    root : Path or str   the absolute folder, URL or hf:NAME that the paths of its samples are relative to
    """

    argument: str
    root: Path | str

    @property
    def is_hub(self) -> bool:
        return self.argument.startswith(HUB)

    @property
    def has_files(self) -> bool:
        """True if the argument names files in `root`, False if it names `root` itself."""
        name = self.argument.rpartition("/")[2]
        return not self.is_hub and suffix_of(self.argument) in FILE_SUFFIXES and name != os.path.basename(self.root)

    @cached_property
    def prefix(self) -> str:
        """What the path of a sample is joined to for display: the argument, or the folder of the files that it names."""
        if self.is_hub:
            return str(self.root)
        return folder_of(self.argument) if self.has_files else self.argument

    @property
    def absolute(self) -> str:
        """The argument, independent of the working directory."""
        if self.is_hub:
            return absolute_argument(self.argument)
        rest = self.argument.removeprefix(self.prefix).lstrip("/")
        return join(self.root, rest) if self.has_files else str(self.root)

    def display_name(self, path: str, part: str = "") -> str:
        """Return the name of an image: the DATA argument, its relative path, and its name in a tar or table."""
        location, _, name = part.partition("/")
        return join(self.prefix, path) + (f"/{name.lstrip('/') or location}" if part else "")


@dataclass(frozen=True)
class Failure:
    """An image without features.

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
    """An image as its source lists it: a `Sample` without a key.

    split : str    "" if the source names none
    task : str     the task of its label column, see `_labels`
    """

    path: str
    label: str | None = None
    split: str = ""
    group: str | None = None
    part: str = ""
    task: str = "single"


@dataclass(frozen=True)
class Listing:
    """All images of one source, and the fields of `Manifest` that describe them."""

    source: Source
    rows: tuple[Row, ...]
    ignored: int = 0
    unreadable: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


def source_of(argument: str) -> Source:
    """Return the source that a DATA argument names."""
    if argument.startswith(HUB):
        return Source(argument, parse_hub(argument)[0])
    argument = argument.removeprefix("file://")
    path = absolute_argument(argument)
    is_file = suffix_of(path) in FILE_SUFFIXES and not os.path.isdir(path)
    return Source(argument, parse_root(folder_of(path) if is_file else path))


def parse_hub(argument: str) -> tuple[str, str]:
    """Split hf:NAME[:CONFIG][@SPLIT] into hf:NAME[:CONFIG], with the absolute path of a folder, and SPLIT or ""."""
    text = argument.removeprefix(HUB)
    name, _, split = (text, "", "") if os.path.isdir(text) else text.partition("@")
    return HUB + (os.path.abspath(name) if os.path.isdir(name) else name), split


def parse_root(text: str) -> Path | str:
    """Return the root of a source from its text: a Path for a folder, the text for a URL or hf:NAME."""
    return text if is_url(text) or text.startswith(HUB) else Path(text)


def absolute_argument(argument: str) -> str:
    """Return a DATA argument in the form that means the same from any working directory."""
    if argument.startswith(HUB):
        root, split = parse_hub(argument)
        return f"{root}@{split}" if split else root
    argument = argument.removeprefix("file://")
    return argument.rstrip("/") if is_url(argument) else os.path.abspath(argument)


def is_data_argument(argument: str) -> bool:
    """Return True if an argument can be DATA: an existing path, or any URL, hf:NAME or brace pattern."""
    return os.path.exists(argument) or is_url(argument) or argument.startswith(HUB) or bool(BRACES.search(argument))


def join(root: str | Path, path: str) -> str:
    """Return a path below a folder or URL; an absolute path or a URL is returned unchanged."""
    return path if is_url(path) else os.path.join(root, path)


def folder_of(path: str) -> str:
    """Return the folder of a file or URL; of a brace pattern, the folder before its first brace."""
    head = path if "{" not in path or os.path.exists(path) else BRACES.split(path)[0]
    folder = head.rpartition("/")[0]
    return folder + "/" if folder.endswith(":/") else folder


def suffix_of(path: str) -> str:
    """Return the suffix of a file or URL in lower case."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    return os.path.splitext(path)[1].lower()


def check_uncompressed(path: str) -> None:
    """Raise UsageError for a compressed tar, whose members are not ranges of its bytes."""
    if COMPRESSED.search(path.lower()):
        hint = "decompress it, for example with gunzip"
        raise UsageError(f"{path!r} is compressed, expected an uncompressed .tar", hint=hint)


def expand_braces(pattern: str) -> list[str]:
    """Return the paths that a brace pattern such as `s-{000..012}.tar` or `{a,b}.tar` names; an existing path alone."""
    if os.path.exists(pattern):
        return [pattern]
    parts = BRACES.split(pattern)  # alternately text and the content of braces
    choices = [_choices(part) if n % 2 else [part] for n, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_FILES:
        raise UsageError(f"{pattern!r} names more than {MAX_FILES} files", hint="give their folder instead")
    return ["".join(path) for path in product(*choices)]


def _choices(content: str) -> Sequence[str]:
    """Return what braces with this content stand for: numbers of FIRST..LAST, texts of A,B, else the braces themselves."""
    ends = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", content)
    if not ends:
        return content.split(",") if "," in content else ["{" + content + "}"]
    width = len(ends[1]) if ends[1].startswith("0") else 1
    numbers = range(int(ends[1]), int(ends[2]) + 1)[: MAX_FILES + 1]
    return [f"{number:0{width}d}" for number in numbers]

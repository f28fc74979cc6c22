"""Source: one DATA argument, and what it names: a folder, files (a brace pattern: several), a URL, or hf:NAME."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from embedpipe.data._hub_images import HUB, parse_hub
from embedpipe.data._remote import is_url
from embedpipe.errors import UsageError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
SHARD_SUFFIXES = (".tar", ".parquet")
FILE_SUFFIXES = (*TABLE_SUFFIXES, *SHARD_SUFFIXES)
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$")
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_FILES = 1_000_000  # of one brace pattern


@dataclass(frozen=True)
class Source:
    """One DATA argument: as typed, and the absolute folder, URL or hf:NAME that its paths are relative to."""

    argument: str
    root: Path | str

    @property
    def is_hub(self) -> bool:
        return self.argument.startswith(HUB)

    @property
    def names_files(self) -> bool:
        """Whether the argument names files in `root`, not `root` itself."""
        name = self.argument.rpartition("/")[2]
        return not self.is_hub and suffix_of(self.argument) in FILE_SUFFIXES and name != os.path.basename(self.root)

    @property
    def has_columns(self) -> bool:
        return self.is_hub or (self.names_files and suffix_of(self.argument) != ".tar")

    @property
    def prefix(self) -> str:
        """What relative paths are joined to for display: the argument, or the folder of the files that it names."""
        if self.is_hub:
            return str(self.root)
        return folder_of(self.argument) if self.names_files else self.argument

    @property
    def absolute(self) -> str:
        """The argument, wherever the process stands."""
        if self.is_hub:
            return absolute_argument(self.argument)
        rest = self.argument.removeprefix(self.prefix).lstrip("/")
        return join(str(self.root), rest) if self.names_files else str(self.root)


def source_of(argument: str) -> Source:
    """Return the source that an argument is."""
    if argument.startswith(HUB):
        return Source(argument, parse_hub(argument)[0])
    argument = argument.removeprefix("file://")
    path = absolute_argument(argument)
    is_file = suffix_of(path) in FILE_SUFFIXES and not os.path.isdir(path)
    return Source(argument, root_of(folder_of(path) if is_file else path))


def root_of(text: str) -> Path | str:
    """Return an absolute folder as a path, anything else as it is."""
    return text if is_url(text) or text.startswith(HUB) else Path(text)


def absolute_argument(argument: str) -> str:
    """Return a DATA argument that means the same from any folder."""
    if argument.startswith(HUB):
        root, split = parse_hub(argument)
        return f"{root}@{split}" if split else root
    argument = argument.removeprefix("file://")
    return argument.rstrip("/") if is_url(argument) else os.path.abspath(argument)


def is_source(argument: str) -> bool:
    """Whether an argument names data, there or not: a path that exists, a URL, hf:NAME, or a pattern of files."""
    return os.path.exists(argument) or is_url(argument) or argument.startswith(HUB) or bool(BRACES.search(argument))


def join(root: str | Path, path: str) -> str:
    """Return a path below a folder or URL; absolute ones and URLs stand for themselves."""
    return path if is_url(path) else os.path.join(root, path)


def folder_of(path: str) -> str:
    """Return the folder of a file or URL, that of a brace pattern being above its first brace."""
    head = path if "{" not in path or os.path.exists(path) else BRACES.split(path)[0]
    folder = head.rpartition("/")[0]
    return folder + "/" if folder.endswith(":/") else folder


def suffix_of(path: str) -> str:
    """Return the suffix of a file or URL in lower case."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    return os.path.splitext(path)[1].lower()


def check_uncompressed(path: str) -> None:
    """Refuse a compressed tar: its members are no ranges of its bytes."""
    if COMPRESSED.search(path.lower()):
        raise UsageError(
            f"{path!r} is compressed, expected an uncompressed .tar", hint="decompress it, such as with gunzip"
        )


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern such as `s-{000..012}.tar` or `{a,b}.tar` stands for; an existing path stands for itself."""
    if os.path.exists(pattern):
        return [pattern]
    parts = BRACES.split(pattern)  # text, inside, text, ...
    choices = [_choices(part) if n % 2 else [part] for n, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_FILES:
        raise UsageError(f"{pattern!r} stands for more than {MOST_FILES} files", hint="name their folder")
    return ["".join(one) for one in product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    ends = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inside)
    if not ends:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    width = len(ends[1]) if ends[1].startswith("0") else 1
    numbers = range(int(ends[1]), int(ends[2]) + 1)[: MOST_FILES + 1]
    return [f"{number:0{width}d}" for number in numbers]

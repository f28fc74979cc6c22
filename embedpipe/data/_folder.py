"""Folders of images, on disk or behind a URL, with labels and splits from the names of their folders.

=====================================  ======  =======
layout                                 label   split
=====================================  ======  =======
`1.png`                                None    ""
`cat/1.png`, `cat/any/depth/1.png`     "cat"   ""
`train/cat/1.png`                      "cat"   "train"
`train/1.png`                          None    "train"
=====================================  ======  =======

The first folders of all paths are splits if all of them have names of splits, such as train, validation and test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedpipe.data._files import is_url, list_url, source_errors
from embedpipe.data._source import COMPRESSED, SHARD_SUFFIXES, Failure, Listing, Row, Source, join
from embedpipe.errors import UsageError
from embedpipe.storage import PathLike

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class FolderContent:
    """The files below a folder: sorted paths of images and shards, the number of others, and (folder, reason) of failures."""

    images: list[str]
    shards: list[str]
    ignored: int
    unreadable: list[tuple[str, str]]

    def failures(self, source: Source) -> tuple[Failure, ...]:
        """Return the folders that could not be listed."""
        return tuple(Failure(join(source.prefix, folder), "read", reason) for folder, reason in self.unreadable)


def list_folder(source: Source, content: FolderContent) -> Listing:
    """List a tree of class folders, a tree of split folders or a flat folder.

    Raises
    ------
    UsageError    split folders and other folders both hold images
    """
    has_splits = are_splits({path.split("/")[0] for path in content.images if "/" in path}, source.argument)
    warnings = tuple(
        f"{len(content.shards)} shard(s) in {source.argument!r} were left out, because the folder also holds images; "
        f"the first is {shard!r}; name shards to use them"
        for shard in content.shards[:1]
    )
    rows = tuple(folder_row(path, has_splits) for path in content.images)
    listing = Listing(source, rows, content.ignored + len(content.shards), content.failures(source), warnings)
    return drop_incomplete(listing, "lie outside the class folders")


def drop_incomplete(listing: Listing, reason: str) -> Listing:
    """Leave out the rows that lack a label or a split if others have one, with a warning."""
    rows = listing.rows
    fields = (any(row.label for row in rows), any(row.split for row in rows))
    complete = tuple(row for row in rows if (bool(row.label), bool(row.split)) == fields)
    dropped = len(rows) - len(complete)
    if not dropped:
        return listing
    first = next(row for row in rows if (bool(row.label), bool(row.split)) != fields)
    name = listing.source.display_name(first.path, first.part).removeprefix(listing.source.prefix).lstrip("/")
    text = f"{dropped} image(s) of {listing.source.argument!r} {reason} and were left out, first {name!r}"
    return replace(listing, rows=complete, ignored=listing.ignored + dropped, warnings=(*listing.warnings, text))


def list_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """Return the image files for prediction: files as they are, and the images below folders, sorted by path.

    Raises
    ------
    UsageError    a path does not exist, or there are no images
    """
    arguments = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    images: list[Path] = []
    for argument in arguments:
        if not os.path.lexists(argument):
            raise UsageError(f"{str(argument)!r} does not exist, expected an image or a folder", hint="check the path")
        images += [argument / path for path in walk(argument).images] if argument.is_dir() else [argument]
    if not images:
        where = ", ".join(map(str, arguments)) or "an empty list"
        message = f"no image in {where}, expected {' '.join(IMAGE_SUFFIXES)}"
        raise UsageError(message, hint="give image files, or folders that hold images")
    return images


def walk(root: Path | str) -> FolderContent:
    """List the files below a folder or URL.

    Hidden names are skipped. Symbolic links are followed, except to a folder that is being listed.

    Raises
    ------
    StorageError    the URL cannot be listed
    """
    if is_url(str(root)):
        return _walk_url(str(root))
    paths: list[str] = []
    ignored, unreadable = 0, []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            identity = (status.st_dev, status.st_ino)
            entries = [] if identity in ancestors else list(os.scandir(os.path.join(root, folder)))
        except OSError as exc:
            unreadable.append((folder, exc.strerror or str(exc)))
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                pending.append((path, ancestors | {identity}))
            elif (is_image(path) or _is_shard(path)) and _is_file(entry):
                paths.append(path)
            else:
                ignored += 1
    return _content(paths, ignored, unreadable)


def _walk_url(url: str) -> FolderContent:
    with source_errors(url, "list"):
        paths = [path for path in list_url(url) if not path.startswith(".") and "/." not in path]
    used = [path for path in paths if is_image(path) or _is_shard(path)]
    return _content(used, len(paths) - len(used), [])


def _content(paths: list[str], ignored: int, unreadable: list[tuple[str, str]]) -> FolderContent:
    images, shards = filter(is_image, paths), (path for path in paths if not is_image(path))
    return FolderContent(sorted(images), sorted(shards), ignored, sorted(unreadable))


def is_image(path: str) -> bool:
    """Return True if a path has the suffix of an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _is_shard(path: str) -> bool:
    return path.lower().endswith(SHARD_SUFFIXES) or COMPRESSED.search(path.lower()) is not None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return True for a file or a broken link, which is reported as unreadable; False for a pipe, which would block."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:  # a link to itself
        return True


def are_splits(folders: set[str], argument: str) -> bool:
    """Return True if the folders are splits, False if they are classes.

    A folder `train` beside other folders is a class; together with `val` or `test` it is a split, and other folders are an
    error.
    """
    splits = {folder for folder in folders if folder.lower() in SPLIT_NAMES}
    others = sorted(folders - splits)
    if others and len({SPLIT_NAMES[folder.lower()] for folder in splits}) > 1:
        found = f"found images in {others[0]!r} beside {', '.join(sorted(splits))} in {argument!r}"
        hint = "move that folder into a split or out of the data"
        raise UsageError(f"{found}, expected only train/, val/ and test/", hint=hint)
    return bool(splits) and not others


def folder_row(path: str, has_splits: bool) -> Row:
    """Return the row of an image with the label and split that its folders name."""
    parts = path.split("/")
    split = SPLIT_NAMES[parts.pop(0).lower()] if has_splits and len(parts) > 1 else ""
    return Row(path, label=parts[0] if len(parts) > 1 else None, split=split)


def splits_of_shards(names: Sequence[str]) -> dict[str, str]:
    """Return the split in the name of each shard, such as `train-000.tar` or `val/0.parquet`.

    The result is {} unless each name has exactly one split, and one of them is train.
    """
    splits = {}
    for name in names:
        found = {SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES}
        if len(found) != 1:
            return {}
        splits[name] = found.pop()
    return splits if "train" in splits.values() else {}

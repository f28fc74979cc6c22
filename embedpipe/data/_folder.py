"""Folders: walk a tree, here or behind a URL, read labels and splits from the names of its folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from embedpipe.data._manifest import Failure, Listing, Row, name_of
from embedpipe.data._remote import is_url, list_url
from embedpipe.data._source import COMPRESSED, SHARD_SUFFIXES, Source, join
from embedpipe.errors import StorageError, UsageError
from embedpipe.storage import PathLike

# fmt: off
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)
# fmt: on
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


class Walked(NamedTuple):
    """What lies below a folder: images and shards sorted by path, the number of other files, unreadable folders."""

    images: list[str]
    shards: list[str]
    ignored: int
    unreadable: list[tuple[str, str]]


def list_folder(source: Source, walked: Walked) -> Listing:
    """Read a class-folder tree, a split tree (`train/ val/ test/`) or a flat folder.

    Raises
    ------
    UsageError    split folders stand beside other folders that hold images
    """
    folders = {path.split("/")[0] for path in walked.images if "/" in path}
    has_splits = are_splits(folders, source.argument)
    listing = Listing(
        source=source,
        rows=tuple(folder_row(path, has_splits) for path in walked.images),
        ignored=walked.ignored + len(walked.shards),
        unreadable=unreadable_folders(source, walked),
        warnings=tuple(
            f"{len(walked.shards)} shard(s) in {source.argument!r} were left out, since images lie beside them, "
            f"first {shard!r}; name shards to use them"
            for shard in walked.shards[:1]
        ),
    )
    return keep_alike(listing, "lie outside the class folders")


def unreadable_folders(source: Source, walked: Walked) -> tuple[Failure, ...]:
    """Return the folders that could not be listed."""
    return tuple(Failure(join(source.prefix, folder), "read", reason) for folder, reason in walked.unreadable)


def keep_alike(listing: Listing, why: str) -> Listing:
    """Leave out, with a warning, rows that lack a label or a split where others have one."""
    rows = listing.rows
    labelled, has_splits = any(row.label for row in rows), any(row.split for row in rows)
    kept = tuple(row for row in rows if bool(row.label) == labelled and bool(row.split) == has_splits)
    if len(kept) == len(rows):
        return listing
    stray = next(row for row in rows if bool(row.label) != labelled or bool(row.split) != has_splits)
    name = name_of(listing.source, stray).removeprefix(listing.source.prefix).lstrip("/")
    text = f"{len(rows) - len(kept)} image(s) of {listing.source.argument!r} {why} and were left out, first {name!r}"
    ignored = listing.ignored + len(rows) - len(kept)
    return replace(listing, rows=kept, ignored=ignored, warnings=(*listing.warnings, text))


def list_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """List image files for prediction: a file as it is, the candidates of a folder sorted by path.

    Raises
    ------
    UsageError    a path does not exist, or none gives an image
    """
    arguments = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    images = [image for argument in arguments for image in _images_of(argument)]
    if not images:
        found = ", ".join(map(str, arguments)) or "an empty list"
        raise UsageError(
            f"no image in {found}, expected {' '.join(IMAGE_SUFFIXES)}",
            hint="give image files, or folders that hold some",
        )
    return images


def _images_of(argument: Path) -> list[Path]:
    if argument.is_dir():
        return [argument / path for path in walk(argument).images]
    if not os.path.lexists(argument):
        raise UsageError(f"{str(argument)!r} does not exist, expected an image or a folder", hint="check the path")
    return [argument]


def walk(root: Path | str) -> Walked:
    """List what lies below a folder or URL. Hidden names are skipped; links are followed, but never into an ancestor.

    Raises
    ------
    StorageError    a URL that cannot be listed
    """
    if is_url(str(root)):
        return _walk_url(str(root))
    images, shards, ignored, unreadable = [], [], 0, []
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
            elif is_image(entry.name) and _is_file(entry):
                images.append(path)
            elif _is_shard(entry.name) and _is_file(entry):
                shards.append(path)
            else:
                ignored += 1
    return Walked(sorted(images), sorted(shards), ignored, sorted(unreadable))


def _walk_url(url: str) -> Walked:
    try:
        paths = [path for path in list_url(url) if not path.startswith(".") and "/." not in path]
    except OSError as exc:
        raise StorageError(
            f"could not list {url!r}: {exc.strerror or exc}", hint="check the address, the network and your credentials"
        ) from exc
    images, shards = [p for p in paths if is_image(p)], [p for p in paths if _is_shard(p)]
    return Walked(images, shards, len(paths) - len(images) - len(shards), [])


def is_image(path: str) -> bool:
    """Whether a path has the suffix of an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _is_shard(path: str) -> bool:
    return path.lower().endswith(SHARD_SUFFIXES) or COMPRESSED.search(path.lower()) is not None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """A pipe would block its reader; a broken link counts, to be reported as unreadable. Costs no `stat` of a file."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:  # a link to itself
        return True


def are_splits(folders: set[str], argument: str) -> bool:
    """One folder called `train` beside others is a class; with `val` or `test` it is a split."""
    splits = {folder for folder in folders if folder.lower() in SPLIT_NAMES}
    others = sorted(folders - splits)
    if others and len({SPLIT_NAMES[folder.lower()] for folder in splits}) > 1:
        raise UsageError(
            f"found images in {others[0]!r} beside {', '.join(sorted(splits))} in {argument!r}, "
            "expected only train/, val/ and test/",
            hint="move that folder into a split or out of the data",
        )
    return bool(splits) and not others


def folder_row(path: str, has_splits: bool) -> Row:
    """Return what the folders of a path say of an image."""
    parts = path.split("/")
    split = SPLIT_NAMES[parts.pop(0).lower()] if has_splits and len(parts) > 1 else ""
    return Row(path, label=parts[0] if len(parts) > 1 else None, split=split)


def split_of_names(names: Sequence[str]) -> dict[str, str]:
    """Return the split that each shard is called by, such as `train-000.tar` or `val/0.parquet`; {} unless all are, and one
    is train.
    """
    found = {
        name: {SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES}
        for name in names
    }
    splits = {name: next(iter(some)) for name, some in found.items() if len(some) == 1}
    return splits if len(splits) == len(found) and "train" in splits.values() else {}

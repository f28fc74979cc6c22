"""Folders: walk a tree, read labels and splits from the names of its folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from embedpipe.errors import UsageError
from embedpipe.manifest._sample import Failure, Listing, Row, Source

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


def list_folder(source: Source) -> Listing:
    """Read a class-folder tree, a split tree (`train/ val/ test/`) or a flat folder.

    Raises
    ------
    UsageError    split folders stand beside other folders that hold images
    """
    images, ignored, unreadable = _walk(source.root)
    folders = {path.split("/")[0] for path in images if "/" in path}
    has_splits = _are_splits(folders, source.argument)
    rows = [_row(path, has_splits) for path in images]
    labelled = any(row.label for row in rows)
    kept = tuple(row for row in rows if bool(row.label) == labelled and bool(row.split) == has_splits)
    strays = sorted({row.path for row in rows} - {row.path for row in kept})
    return Listing(
        source=source,
        rows=kept,
        ignored=ignored + len(strays),
        unreadable=tuple(Failure(os.path.join(source.prefix, folder), "read", reason) for folder, reason in unreadable),
        warnings=tuple(
            f"{len(strays)} image(s) of {source.argument!r} lie outside the class folders "
            f"and were left out, first {stray!r}"
            for stray in strays[:1]
        ),
    )


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List image files for prediction: a file as it is, the candidates of a folder sorted by path.

    Raises
    ------
    UsageError    a path does not exist, or none gives an image
    """
    arguments = [Path(path) for path in paths]
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
        return [argument / path for path in _walk(argument)[0]]
    if not os.path.lexists(argument):
        raise UsageError(f"{str(argument)!r} does not exist, expected an image or a folder", hint="check the path")
    return [argument]


def _walk(root: Path) -> tuple[list[str], int, list[tuple[str, str]]]:
    """Return the candidates sorted by path, the number of other files, and (folder, reason) of
    those that could not be listed. Hidden names are skipped; links are followed, but never into
    an ancestor.
    """
    images, ignored, unreadable = [], 0, []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        try:
            status = os.stat(root / folder)
            identity = (status.st_dev, status.st_ino)
            entries = [] if identity in ancestors else list(os.scandir(root / folder))
        except OSError as exc:
            unreadable.append((folder, exc.strerror or str(exc)))
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                pending.append((path, ancestors | {identity}))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and _is_file(entry):
                images.append(path)
            else:
                ignored += 1
    return sorted(images), ignored, sorted(unreadable)


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


def _are_splits(folders: set[str], argument: str) -> bool:
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


def _row(path: str, has_splits: bool) -> Row:
    parts = path.split("/")
    split = SPLIT_NAMES[parts.pop(0).lower()] if has_splits and len(parts) > 1 else ""
    return Row(path, label=parts[0] if len(parts) > 1 else None, split=split)

"""Rows of data sets that the `datasets` library loads: from the Hub, its cache, or a folder that it has saved.

A split is called hf:NAME[:CONFIG]/SPLIT, NAME being `data`, `owner/data` or the absolute path of a folder.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from embedpipe.data._parquet_images import bytes_of
from embedpipe.errors import UsageError

HUB = "hf:"
SAVED = ("dataset_dict.json", "state.json")


def parse_hub(argument: str) -> tuple[str, str]:
    """Return hf:NAME[:CONFIG], a folder by its absolute path, and the split that hf:NAME[:CONFIG][@SPLIT] names, or ""."""
    text = argument.removeprefix(HUB)
    name, _, split = (text, "", "") if os.path.isdir(text) else text.partition("@")
    return HUB + (os.path.abspath(name) if os.path.isdir(name) else name), split


@lru_cache(16)
def open_split(root: str, split: str) -> Any:
    """Return the `Dataset` of a split, or with "" the `DatasetDict` of all.

    Raises
    ------
    UsageError    `datasets` is not installed, or finds nothing of that name
    """
    try:
        import datasets
    except ImportError as exc:
        raise UsageError(f"{root!r} needs datasets", hint="pip install 'embedpipe[hf]'") from exc
    text = root.removeprefix(HUB)
    name, _, config = (text, "", "") if os.path.isdir(text) else text.partition(":")
    try:
        if any(os.path.exists(os.path.join(name, file)) for file in SAVED):
            return _of_saved(datasets.load_from_disk(name), split)
        return datasets.load_dataset(name, config or None, split=split or None)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        found = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise UsageError(
            f"{root}{'@' if split else ''}{split}: {found}",
            hint="expected hf:NAME[:CONFIG][@SPLIT], or hf:FOLDER as save_to_disk writes it",
        ) from exc


def _of_saved(found: Any, split: str) -> Any:
    """Return a split of what `load_from_disk` gave; a lone `Dataset` is called by its own split, or train."""
    import datasets

    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict({str(found.split or "train"): found})
    if split and split not in found:
        raise ValueError(f"no split {split!r}, expected {' or '.join(found)}")
    return found[split] if split else found


@lru_cache(64)
def _open_column(path: str, column: str) -> Any:
    import datasets

    root, _, split = path.rpartition("/")
    return open_split(root, split).select_columns([column]).cast_column(column, datasets.Image(decode=False))


def read_hub_row(path: str, location: str) -> bytes:
    """Return the bytes in one row of a split.

    Parameters
    ----------
    path : str        hf:NAME[:CONFIG]/SPLIT
    location : str    "row ROW COLUMN"

    Raises
    ------
    OSError    nothing in it, or the file that it names cannot be read
    """
    _, row, column = location.split(" ", 2)
    cell = _open_column(path, column)[int(row)][column]
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        with open(cell["path"], "rb") as stream:
            return stream.read()
    return bytes_of(cell)


def hub_version(path: str) -> str | None:
    """Return the fingerprint of a split."""
    root, _, split = path.rpartition("/")
    found = getattr(open_split(root, split), "_fingerprint", None)
    return found if isinstance(found, str) else None


def forget_splits() -> None:
    """Load again what is asked for next."""
    open_split.cache_clear()
    _open_column.cache_clear()

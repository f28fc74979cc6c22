"""The cache folder: spaces, data sets (sample tables), and a record of the last extraction."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedpipe.cache._datasets import dataset_name, has_source, read_table, write_table
from embedpipe.cache._meta import FEATURES, FILE, SHARDS, WriterLock, mark_used, read_meta
from embedpipe.cache._sealed import damage_error
from embedpipe.cache._space import Space
from embedpipe.data import Manifest
from embedpipe.errors import CacheMismatch, StorageError, UsageError
from embedpipe.provenance import canonical_json, fingerprint, nearest
from embedpipe.storage import TEMPORARY, storage_errors, sync_path, write_atomic

LEFTOVER_S = 3600.0  # a younger temporary file may still be in use
EXTRACT_FIRST = "run `embedpipe extract DATA` first"


@dataclass(frozen=True)
class Cache:
    """A cache folder, which is created by the first write."""

    root: Path

    def open_space(self, spec: Mapping[str, Any]) -> Space:
        """Return the space of a spec, whether or not it exists; its folder is `<source>-<architecture>-<fingerprint12>`.

        Parameters
        ----------
        spec : JSON values: everything that determines a feature
        """
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{spec['source']}-{spec['architecture']}").strip(".-")
        folder = f"{readable[:100]}-{fingerprint(spec)[:12]}"
        return Space(self.spaces_folder / folder, json.loads(canonical_json(spec)))

    def spaces(self) -> list[Space]:
        """Return all existing spaces that can be read, sorted by folder.

        Raises
        ------
        CacheMismatch    the metadata of a space is damaged
        """
        spaces = [self._read_space(name) for name in self.space_names()]
        return [space for space in spaces if not space.unsupported]

    def space_names(self) -> list[str]:
        """Return the folder names of all existing spaces, sorted, including damaged and unsupported ones."""
        return sorted(path.name for path in self.spaces_folder.glob("[!.]*") if _is_space(path))

    def find_space(self, text: str) -> Space:
        """Return the space with the folder name `text`, or the only one whose folder name begins with it.

        Raises
        ------
        UsageError    no or several spaces match
        """
        return self._read_space(_pick(text, self.space_names(), "space"))

    def find(self, text: str) -> str:
        """Return the space or data set with that name or prefix, or the data set with that id or source.

        Raises
        ------
        UsageError    none or several match
        """
        names = [*self.space_names(), *self.datasets()]
        if not any(name.startswith(text) for name in names):
            with suppress(UsageError):
                return self.find_dataset(text)
        return _pick(text, names, "space or data set")

    def write_dataset(self, manifest: Manifest) -> str:
        """Write the sample table of a data set, replacing that of the same sources; return its name."""
        name = dataset_name(manifest)
        write_table(self.table_path(name), manifest)
        return name

    def read_dataset(self, name: str | None = None) -> Manifest:
        """Return the manifest of a data set, given by name, id, source or prefix; default: the one extracted last.

        Raises
        ------
        UsageError    nothing has been extracted yet, or no or several data sets match
        """
        if name is None:
            latest = self.latest()
            if latest is None:
                raise UsageError(f"nothing has been extracted into {self.root}", hint=EXTRACT_FIRST)
            name = str(latest["dataset"])
        return read_table(self.table_path(self.find_dataset(name)))

    def find_dataset(self, text: str) -> str:
        """Return the data set with that name, id, source or prefix.

        Raises
        ------
        UsageError    no or several data sets match
        """
        names = self.datasets()
        matches = [name for name in names if text in (name, name.rpartition("-")[2])]
        matches = matches or [name for name in names if has_source(self.table_path(name), text)]
        return matches[0] if len(matches) == 1 else _pick(text, names, "data set")

    def datasets(self) -> list[str]:
        """Return the names of all sample tables."""
        return sorted(path.stem for path in (self.root / "datasets").glob("[!.]*.h5"))

    def latest(self) -> dict[str, Any] | None:
        """Return {"dataset": name, "spaces": [folder names]} of the last extraction, or None."""
        with storage_errors(self._latest, "read"):
            if not self._latest.exists():
                return None
            raw = self._latest.read_bytes()
        try:
            fields = json.loads(raw)
            latest = {"dataset": str(fields["dataset"]), "spaces": list(map(str, fields["spaces"]))}
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise damage_error(self._latest, "it is not a record of an extraction") from exc
        if raw != _serialize(latest):
            raise damage_error(self._latest, "its bytes have changed")
        return latest

    def set_latest(self, dataset: str, spaces: Sequence[str]) -> None:
        """Record the last extraction: the name of its data set, and the folder names of its spaces."""
        write_atomic(self._latest, _serialize({"dataset": dataset, "spaces": list(spaces)}))
        for name in spaces:
            mark_used(self.spaces_folder / name)

    def remove_space(self, name: str, *, dry_run: bool = False) -> None:
        """Remove a space under its writer lock; with `dry_run`, only check that this is possible.

        The folder is renamed to a temporary name before it is deleted, so a killed process leaves no half of a space.

        Raises
        ------
        CacheBusy       another process writes to the space
        StorageError    the lock does not exclude other writers, or the operating system refused
        """
        folder = self.spaces_folder / name
        with closing(WriterLock(folder)) as lock, storage_errors(folder, "remove"):
            if not lock.exclusive:
                hint = "remove the folder by hand when nothing writes to it"
                raise StorageError(f"locks on {folder} exclude nobody, another process may be writing", hint=hint)
            if dry_run:
                return
            hidden = folder.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            folder.rename(hidden)
            sync_path(folder.parent)
            shutil.rmtree(hidden)
        with suppress(CacheMismatch):  # a damaged latest.json names nothing
            latest = self.latest() or {"spaces": []}
            if name in latest["spaces"]:
                latest["spaces"].remove(name)
                write_atomic(self._latest, _serialize(latest))

    def remove_dataset(self, name: str) -> None:
        """Remove a sample table, and latest.json if it names that data set."""
        paths = [self.table_path(name)]
        with suppress(CacheMismatch):
            paths += [self._latest] if (self.latest() or {}).get("dataset") == name else []
        for path in paths:
            with storage_errors(path, "remove"):
                path.unlink(missing_ok=True)

    @property
    def spaces_folder(self) -> Path:
        return self.root / "spaces"

    @property
    def graphs_folder(self) -> Path:
        """Compiled graphs of executors, which only save time."""
        return self.root / "graphs"

    def table_path(self, name: str) -> Path:
        """Return the path of the sample table of a data set."""
        return self.root / "datasets" / f"{name}.h5"

    @property
    def _latest(self) -> Path:
        return self.root / "latest.json"

    def _read_space(self, name: str) -> Space:
        meta = read_meta(self.spaces_folder / name)
        if meta is None or not name.endswith(fingerprint(meta.spec)[:12]):
            raise damage_error(self.spaces_folder / name, "its name does not fit its spec")
        return Space(self.spaces_folder / name, meta.spec)


def _is_space(folder: Path) -> bool:
    """Return True if a folder has meta.json, or has rows and has lost it."""
    return (folder / FILE).exists() or (folder / FEATURES).exists() or any(folder.glob(f"{SHARDS}/[!.]*.h5"))


def _serialize(fields: Mapping[str, Any]) -> bytes:
    return (canonical_json({**fields, "seal": fingerprint(fields)}) + "\n").encode()


def _pick(text: str, names: Sequence[str], kind: str) -> str:
    """Return the only name that equals `text`, with or without its digest, or else the only one that begins with it."""
    equal = [name for name in names if name == text]
    without_digest = [name for name in names if name.rpartition("-")[0] == text]
    longer = [name for name in names if name.startswith(text)]
    for matches in (equal, without_digest, longer):
        if len(matches) == 1:
            return matches[0]
    if longer:
        message = f"{text!r} is ambiguous: it matches {len(longer)} {kind}s, {', '.join(longer)}"
        raise UsageError(message, hint="use a longer prefix")
    near = nearest(text, names) or list(names)[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else EXTRACT_FIRST
    raise UsageError(f"no {kind} {text!r} in the cache", hint=hint, found=text, near=near)


def measure(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; files that vanish meanwhile count as empty."""
    below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in below if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            total += os.lstat(file).st_size
    return total


def sweep_leftovers(root: Path, *, dry_run: bool) -> dict[str, int]:
    """Remove temporary files and folders that are older than an hour; return their names and bytes."""
    swept = {}
    for folder in (root, root / "spaces", root / "datasets", root / "graphs"):
        for path in sorted(folder.glob(f"{TEMPORARY}*")):
            with storage_errors(path, "remove"), suppress(FileNotFoundError):
                if path.lstat().st_mtime > time.time() - LEFTOVER_S:
                    continue
                swept[path.name] = measure(path)
                if not dry_run:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return swept

"""A cache folder: spaces, sample tables, and what was extracted last."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpipe.cache._caring import mark_used, remove_space
from embedpipe.cache._datasets import dataset_name, read_table, reads, write_table
from embedpipe.cache._meta import FILE, read_meta
from embedpipe.cache._space import Space
from embedpipe.cache._structure import damaged
from embedpipe.errors import CacheMismatch, UsageError
from embedpipe.provenance import canonical_json, fingerprint, nearest
from embedpipe.storage import publish, storage_errors

if TYPE_CHECKING:
    from embedpipe.data import Manifest

EXTRACT_FIRST = "run `embedpipe extract DATA` first"


@dataclass(frozen=True)
class Cache:
    """Everything below one folder; nothing is made before the first write."""

    root: Path

    def open_space(self, spec: Mapping[str, Any], *, name: str) -> Space:
        """Return the space of a spec, on disk or not yet.

        Parameters
        ----------
        spec : JSON-able; everything that shapes a feature
        name : readable prefix of the folder, such as timm-resnet18
        """
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "space"
        folder = f"{readable[:100]}-{fingerprint(spec)[:12]}"
        return Space(self.spaces_folder / folder, json.loads(canonical_json(spec)))

    def spaces(self) -> list[Space]:
        """Return all spaces on disk, sorted by folder."""
        return [self._read_space(name) for name in self.space_names()]

    def space_names(self) -> list[str]:
        """Return the folders of all spaces on disk, sorted, the damaged ones too."""
        return sorted(path.name for path in self.spaces_folder.glob("[!.]*") if _holds_space(path))

    def find_space(self, text: str) -> Space:
        """Return the space whose folder is called `text` or is the only one to begin so.

        Raises
        ------
        UsageError    none or several
        """
        return self._read_space(_pick(text, self.space_names(), "space"))

    def find(self, text: str) -> str:
        """Return the space or data set of that name or prefix, or the data set of that id or source.

        Raises
        ------
        UsageError    none or several
        """
        names = [*self.space_names(), *self.datasets()]
        if not any(name.startswith(text) for name in names):
            with suppress(UsageError):
                return self.find_dataset(text)
        return _pick(text, names, "space or data set")

    def write_dataset(self, manifest: Manifest) -> str:
        """Store a sample table, replacing that of the same sources; return its name."""
        name = dataset_name(manifest)
        write_table(self.table_path(name), manifest)
        return name

    def read_dataset(self, name: str | None = None) -> Manifest:
        """Return the manifest of a data set: the latest, or by name, id, source or prefix.

        Raises
        ------
        UsageError    nothing extracted yet, none or several of that name
        """
        if name is None:
            latest = self.latest()
            if latest is None:
                found = f"nothing has been extracted into {self.root}"
                raise UsageError(found, hint=EXTRACT_FIRST)
            name = str(latest["dataset"])
        return read_table(self.table_path(self.find_dataset(name)))

    def find_dataset(self, text: str) -> str:
        """Return the data set of that name, id, source or prefix.

        Raises
        ------
        UsageError    none or several
        """
        names = self.datasets()
        exact = [one for one in names if text in (one, one.rpartition("-")[2])]
        same = exact or [one for one in names if reads(self.table_path(one), text)]
        return same[0] if len(same) == 1 else _pick(text, names, "data set")

    def datasets(self) -> list[str]:
        """Return the names of all sample tables."""
        return sorted(path.stem for path in self.datasets_folder.glob("[!.]*.h5"))

    def latest(self) -> dict[str, Any] | None:
        """Return {"dataset": name, "spaces": [folders]} of the last extraction, or None."""
        with storage_errors(self._latest, "read"):
            if not self._latest.exists():
                return None
            raw = self._latest.read_bytes()
        try:
            fields = json.loads(raw)
            latest = {"dataset": str(fields["dataset"]), "spaces": list(map(str, fields["spaces"]))}
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise damaged(self._latest, "it is not a record of an extraction") from exc
        if raw != _line(latest):
            raise damaged(self._latest, "its bytes are not those that were written")
        return latest

    def set_latest(self, dataset: str, spaces: Sequence[str]) -> None:
        """Record the last extraction: its sample table and the folders of its spaces, by name."""
        publish(self._latest, _line({"dataset": dataset, "spaces": list(spaces)}))
        for name in spaces:
            mark_used(self.spaces_folder / name)

    def remove_space(self, name: str, *, dry_run: bool = False) -> None:
        """Remove a space whole, under its writer's lock; with `dry_run` only find out whether that can be done.

        Raises
        ------
        CacheBusy       a writer holds it
        StorageError    the lock cannot be proved to exclude writers, or the disk refuses
        """
        remove_space(self.spaces_folder / name, dry_run=dry_run)
        with suppress(CacheMismatch):  # a damaged record names nothing
            latest = self.latest()
            if not dry_run and latest and name in latest["spaces"]:
                publish(self._latest, _line({**latest, "spaces": [one for one in latest["spaces"] if one != name]}))

    def remove_dataset(self, name: str) -> None:
        """Remove a sample table, and the record of the last extraction where it was that one."""
        gone = [self.table_path(name)]
        with suppress(CacheMismatch):
            gone += [self._latest] if (self.latest() or {}).get("dataset") == name else []
        for path in gone:
            with storage_errors(path, "remove"):
                path.unlink(missing_ok=True)

    @property
    def spaces_folder(self) -> Path:
        return self.root / "spaces"

    @property
    def datasets_folder(self) -> Path:
        return self.root / "datasets"

    @property
    def graphs_folder(self) -> Path:
        """Where executors keep converted graphs: time saved, nothing else."""
        return self.root / "graphs"

    def table_path(self, name: str) -> Path:
        """Return where the sample table of a data set lies."""
        return self.datasets_folder / f"{name}.h5"

    @property
    def _latest(self) -> Path:
        return self.root / "latest.json"

    def _read_space(self, name: str) -> Space:
        meta = read_meta(self.spaces_folder / name)
        if meta is None or not name.endswith(fingerprint(meta.spec)[:12]):
            raise damaged(self.spaces_folder / name, "its name does not fit its spec")
        return Space(self.spaces_folder / name, meta.spec)


def _holds_space(folder: Path) -> bool:
    """Whether a writer got as far as meta.json, or that has been lost since."""
    return (folder / FILE).exists() or any(folder.glob("features.h5")) or any(folder.glob("shards/[!.]*.h5"))


def _line(fields: Mapping[str, Any]) -> bytes:
    return (canonical_json({**fields, "seal": fingerprint(fields)}) + "\n").encode()


def _pick(text: str, names: Sequence[str], kind: str) -> str:
    ways = (str.__eq__, lambda name, wanted: name.rpartition("-")[0] == wanted, str.startswith)
    found = [[name for name in names if way(name, text)] for way in ways]  # whole, without its digest, by its beginning
    fits = next((some for some in found if len(some) == 1), found[-1])
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UsageError(f"{text!r} begins {len(fits)} {kind}s: {', '.join(fits)}", hint="name one of them")
    near = nearest(text, names) or list(names)[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else EXTRACT_FIRST
    raise UsageError(f"no {kind} {text!r} in the cache", hint=hint, found=text, near=near)

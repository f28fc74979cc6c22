"""A cache folder: spaces, sample tables, and what was extracted last."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpipe.cache._datasets import dataset_name, read_table, reads, write_table
from embedpipe.cache._meta import FILE, read_meta
from embedpipe.cache._space import Space
from embedpipe.cache._structure import damaged
from embedpipe.disk import publish, storage_errors
from embedpipe.errors import UsageError
from embedpipe.provenance import canonical_json, fingerprint, nearest

if TYPE_CHECKING:
    from embedpipe.manifest import Manifest

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
        return Space(self._spaces / folder, json.loads(canonical_json(spec)))

    def spaces(self) -> list[Space]:
        """Return all spaces on disk, sorted by folder."""
        return [self._read_space(name) for name in self._space_names()]

    def find_space(self, text: str) -> Space:
        """Return the space whose folder is called `text` or is the only one to begin so.

        Raises
        ------
        UsageError    none or several
        """
        return self._read_space(_pick(text, self._space_names(), "space"))

    def write_dataset(self, manifest: Manifest) -> str:
        """Store a sample table, replacing that of the same sources; return its name."""
        name = dataset_name(manifest)
        write_table(self._table(name), manifest)
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
            name = latest["dataset"]
        names = self.datasets()
        exact = [one for one in names if name in (one, one.rpartition("-")[2])]
        same = exact or [one for one in names if reads(self._table(one), name)]
        return read_table(self._table(same[0] if len(same) == 1 else _pick(name, names, "data set")))

    def datasets(self) -> list[str]:
        """Return the names of all sample tables."""
        return sorted(path.stem for path in self._datasets.glob("[!.]*.h5"))

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
        if _render_latest(latest) != raw:
            raise damaged(self._latest, "its bytes are not those that were written")
        return latest

    def set_latest(self, dataset: str, spaces: Sequence[str]) -> None:
        """Record the last extraction: its sample table and the folders of its spaces, by name."""
        publish(self._latest, _render_latest({"dataset": dataset, "spaces": list(spaces)}))

    @property
    def _spaces(self) -> Path:
        return self.root / "spaces"

    @property
    def _datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def _latest(self) -> Path:
        return self.root / "latest.json"

    def _table(self, name: str) -> Path:
        return self._datasets / f"{name}.h5"

    def _space_names(self) -> list[str]:
        return sorted(path.parent.name for path in self._spaces.glob(f"*/{FILE}"))

    def _read_space(self, name: str) -> Space:
        meta = read_meta(self._spaces / name)
        if meta is None or not name.endswith(fingerprint(meta.spec)[:12]):
            raise damaged(self._spaces / name, "its name does not fit its spec")
        return Space(self._spaces / name, meta.spec)


def _render_latest(fields: Mapping[str, Any]) -> bytes:
    return (canonical_json({**fields, "seal": fingerprint(fields)}) + "\n").encode()


def _pick(text: str, names: Sequence[str], kind: str) -> str:
    fits = [name for name in names if name == text] or [n for n in names if n.startswith(text)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UsageError(f"{text!r} begins {len(fits)} {kind}s: {', '.join(fits)}", hint="name one of them")
    near = nearest(text, names) or list(names)[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else EXTRACT_FIRST
    raise UsageError(f"no {kind} {text!r} in the cache", hint=hint, found=text, near=near)

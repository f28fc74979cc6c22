"""Run folders: `<time>-<verb>-<id>/`, written whole and found again by id, unique prefix or path.

Any room may enter. A folder that is there is complete: it is filled under a hidden name and renamed at the end.

>>> with new_run(Path("runs"), "fit-head") as run:
...     run.write_json("run.json", {"verb": "fit-head"})
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedpipe.disk import make_folder, storage_errors, sync_folder
from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.provenance import nearest


@dataclass(frozen=True)
class RunFolder:
    """A run being written.

    folder : Path    where files go now; after the block they are at `final`
    final : Path     the name that users see
    """

    folder: Path
    final: Path

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text, encoding="utf-8", errors="surrogateescape")


@contextmanager
def new_run(runs_dir: Path, verb: str) -> Iterator[RunFolder]:
    """Make a run folder; it appears under its name when the block ends well, and not at all otherwise.

    Raises
    ------
    StorageError    the folder cannot be written
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}-{secrets.token_hex(3)}"
    run = RunFolder(runs_dir / f".tmp-{name}", runs_dir / name)
    with storage_errors(run.final, "write the run folder"):
        make_folder(runs_dir)
        run.folder.mkdir()
        try:
            yield run
            _sync_tree(run.folder)
            run.folder.rename(run.final)
            sync_folder(runs_dir)
        except BaseException:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    for path in [*folder.rglob("*/"), folder]:
        sync_folder(path)


def list_runs(runs_dir: Path) -> list[Path]:
    """Return the complete runs, oldest first."""
    if not runs_dir.is_dir():
        return []
    return sorted(p.parent for p in runs_dir.glob("*/run.json") if not p.parent.name.startswith("."))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `run.json` holds.

    Raises
    ------
    ModelMismatch    the file is missing or is not what embedpipe writes
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "verb" not in record:
            raise ValueError("no verb in it")
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelMismatch(
            f"{folder} holds no readable run.json ({exc})", hint="name a folder that fit-head wrote"
        ) from exc
    return record


def find_run(runs_dir: Path, text: str | os.PathLike[str]) -> Path:
    """Return the run that `text` names: a folder, a run's name, its id, or a unique prefix of either.

    Raises
    ------
    UsageError    none or several fit
    """
    text = os.fspath(text)
    if (Path(text) / "run.json").is_file():
        return Path(text)
    runs = list_runs(runs_dir)
    hits = [p for p in runs if p.name.startswith(text) or p.name.rsplit("-", 1)[-1].startswith(text)]
    if len(hits) == 1:
        return hits[0]
    if hits:
        shown = ", ".join(p.name for p in hits[-3:])
        raise UsageError(f"{len(hits)} runs begin with {text!r}: {shown}", hint="give more of the name")
    close = nearest(text, [p.name for p in runs]) or [p.name for p in runs[-3:]]
    raise UsageError(
        f"no run {text!r} in {runs_dir}",
        hint=f"did you mean {', '.join(close)}?" if close else "run `embedpipe fit-head` first",
    )


def latest_run(runs_dir: Path, verb: str, accept: Callable[[dict[str, Any]], bool] = lambda _: True) -> Path:
    """Return the newest run of `verb` whose record `accept` takes.

    Raises
    ------
    UsageError    there is none
    """
    for folder in reversed(list_runs(runs_dir)):
        record = read_run(folder)
        if record["verb"] == verb and accept(record):
            return folder
    raise UsageError(f"no run of {verb} that fits in {runs_dir}", hint=f"run `embedpipe {verb}` first")

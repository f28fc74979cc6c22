"""Run folders: `<time>-<verb>-<id>/`, written whole and found again by id, unique prefix or path.

Any room may enter. A folder that is there is complete: it is filled under a hidden name and renamed at the end. What a
run that takes long needs to go on lies in `.unfinished-<its name>/` until then.

>>> with new_run(Path("runs"), "fit-head") as run:
...     run.write_json("run.json", {"verb": "fit-head"})
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedpipe.errors import CacheBusy, ModelMismatch, UsageError
from embedpipe.provenance import nearest
from embedpipe.storage import TEMPORARY, PathLike, make_folder, sweep, whole_folder

UNFINISHED = ".unfinished-"


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

    def write_csv(self, name: str, rows: Iterable[Iterable[Any]]) -> None:
        self.write_text(name, csv_text(rows))

    def write_text(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV, each ended by a line feed alone; a carriage return in a name is quoted, as a line feed is."""
    return "".join(map(_line, rows))


def _line(row: Iterable[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(row)  # what ends a line is what it quotes
    return out.getvalue()[:-2] + "\n"


def new_name(verb: str) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}-{secrets.token_hex(3)}"


@contextmanager
def new_run(runs_dir: Path, verb: str, *, name: str | None = None) -> Iterator[RunFolder]:
    """Make a run folder; it appears under its name when the block ends well, and not at all otherwise.

    Parameters
    ----------
    name : str    of an unfinished run that is held; default: a new one

    Raises
    ------
    StorageError    the folder cannot be written
    """
    final = runs_dir / (name or new_name(verb))
    with whole_folder(final, hidden=final.with_name(f"{TEMPORARY}{final.name}"), what="run folder") as folder:
        yield RunFolder(folder, final)


@contextmanager
def hold_unfinished(runs_dir: Path, name: str) -> Iterator[Path]:
    """Hold the folder of an unfinished run, made where it is missing; it goes when the block ends well, or without a file.

    Raises
    ------
    CacheBusy       another process works on this run
    StorageError    the folder cannot be made
    """
    _sweep_unfinished(runs_dir)
    folder = unfinished_folder(runs_dir, name)
    make_folder(folder)
    with _locked(folder):
        sweep(folder)
        try:
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        name = folder.name.removeprefix(UNFINISHED)
        raise CacheBusy(f"another process works on the run {name}", hint="wait for it, or name another run") from exc
    try:
        yield
    finally:
        os.close(descriptor)


def _sweep_unfinished(runs_dir: Path) -> None:
    """Remove what killed processes left and nobody can go on with: their run is there, or no checkpoint of it."""
    for left in runs_dir.glob(f"{UNFINISHED}*"):
        done = (runs_dir / left.name.removeprefix(UNFINISHED)).exists()
        if done or not any(left.glob("[!.]*")):
            with suppress(OSError), _locked(left):
                shutil.rmtree(left)


def unfinished_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{UNFINISHED}{name}"


def find_unfinished(runs_dir: Path, verb: str, text: str | None = None) -> str:
    """Return the name of the latest unfinished run of a verb, or of the one that `text` names as in `find_run`.

    Raises
    ------
    UsageError    none or several fit
    """
    folders = [p for p in runs_dir.glob(f"{UNFINISHED}*-{verb}-*") if any(p.glob("[!.]*"))]
    names = sorted(name for p in folders if not (runs_dir / (name := p.name.removeprefix(UNFINISHED))).exists())
    hits = [name for name in names if text is None or _is_named(name, text)]
    if not hits or (text and len(hits) > 1):
        shown = ", ".join(names[-3:])
        wanted = f"{len(hits) or 'no'} unfinished runs of {verb} in {runs_dir}" + (
            f" begin with {text!r}" if text else ""
        )
        raise UsageError(wanted, hint=f"found {shown}" if shown else "leave out --resume to start one")
    return hits[-1]


def _is_named(name: str, text: str) -> bool:
    return name.startswith(text) or name.rsplit("-", 1)[-1].startswith(text)


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


def find_run(runs_dir: Path, text: PathLike) -> Path:
    """Return the run that `text` names: a folder, a run's name, its id, or a unique prefix of either.

    Raises
    ------
    UsageError    none or several fit
    """
    text = os.fspath(text)
    if (Path(text) / "run.json").is_file():
        return Path(text)
    runs = list_runs(runs_dir)
    hits = [p for p in runs if _is_named(p.name, text)]
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

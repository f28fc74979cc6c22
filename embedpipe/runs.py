"""Run folders: `<time>-<verb>-<id>/`, written atomically and found by id, unique prefix or path.

A run folder is complete: it is written under a hidden name and renamed at the end. Until then, the checkpoints of a long
run are in `.unfinished-<name>/`.

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
from embedpipe.storage import TEMPORARY, PathLike, atomic_folder, make_folder, sweep

UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class RunFolder:
    """A run that is being written.

    folder : Path    temporary folder; it is renamed to `final` at the end
    final : Path     final name
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
    """Return rows as CSV with line feeds; carriage returns and line feeds within a cell are quoted."""
    return "".join(map(_line, rows))


def _line(row: Iterable[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(row)  # csv quotes the characters of the line terminator
    return out.getvalue()[:-2] + "\n"


def new_name(verb: str) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}-{secrets.token_hex(3)}"


@contextmanager
def new_run(runs_dir: Path, verb: str, *, name: str | None = None) -> Iterator[RunFolder]:
    """Create a run folder, which gets its final name if the block succeeds and is removed otherwise.

    Parameters
    ----------
    name : str    name of the unfinished run that is continued; default: a new name

    Raises
    ------
    StorageError    the folder cannot be written
    """
    final = runs_dir / (name or new_name(verb))
    with atomic_folder(final, hidden=final.with_name(f"{TEMPORARY}{final.name}"), what="run folder") as folder:
        yield RunFolder(folder, final)


@contextmanager
def lock_unfinished(runs_dir: Path, name: str) -> Iterator[Path]:
    """Create and lock the folder of an unfinished run; it is removed if the block succeeds or if it is empty.

    Raises
    ------
    CacheBusy       another process holds the lock of this run
    StorageError    the folder cannot be created
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
        raise CacheBusy(f"another process works on the run {name}", hint="wait for it, or choose another run") from exc
    try:
        yield
    finally:
        os.close(descriptor)


def _sweep_unfinished(runs_dir: Path) -> None:
    """Remove unfinished folders of killed processes that are of no use: the run is complete, or there is no checkpoint."""
    for folder in runs_dir.glob(f"{UNFINISHED}*"):
        done = (runs_dir / folder.name.removeprefix(UNFINISHED)).exists()
        if done or not any(folder.glob("[!.]*")):
            with suppress(OSError), _locked(folder):
                shutil.rmtree(folder)


def unfinished_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{UNFINISHED}{name}"


def find_unfinished(runs_dir: Path, verb: str, text: str | None = None) -> str:
    """Return the name of the latest unfinished run of a command, or of the one named by `text` as in `find_run`.

    Raises
    ------
    UsageError    none or several match
    """
    folders = [p for p in runs_dir.glob(f"{UNFINISHED}*-{verb}-*") if any(p.glob("[!.]*"))]
    names = sorted(name for p in folders if not (runs_dir / (name := p.name.removeprefix(UNFINISHED))).exists())
    hits = [name for name in names if text is None or _is_named(name, text)]
    if not hits or (text and len(hits) > 1):
        shown = ", ".join(names[-3:])
        wanted = f"{len(hits) or 'no'} unfinished runs of {verb} in {runs_dir}" + (f" match {text!r}" if text else "")
        raise UsageError(wanted, hint=f"found {shown}" if shown else "leave out --resume to start one")
    return hits[-1]


def _is_named(name: str, text: str) -> bool:
    return name.startswith(text) or name.rsplit("-", 1)[-1].startswith(text)


def list_runs(runs_dir: Path) -> list[Path]:
    """Return the folders of complete runs, oldest first."""
    return sorted(p.parent for p in runs_dir.glob("*/run.json") if not p.parent.name.startswith("."))


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`.

    Raises
    ------
    ModelMismatch    the file is missing or was not written by embedpipe
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "verb" not in record:
            raise ValueError("it has no verb")
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelMismatch(f"{folder} holds no readable run.json ({exc})", hint="name the folder of a run") from exc
    return record


def find_run(runs_dir: Path, text: PathLike) -> Path:
    """Return the folder of the run named by `text`: a folder, a name, an id, or a unique prefix of either.

    Raises
    ------
    UsageError    none or several match
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
        message = f"{text!r} is ambiguous: it matches {len(hits)} runs, among them {shown}"
        raise UsageError(message, hint="use a longer prefix")
    close = nearest(text, [p.name for p in runs]) or [p.name for p in runs[-3:]]
    hint = f"did you mean {', '.join(close)}?" if close else "run `embedpipe fit-head` first"
    raise UsageError(f"no run {text!r} in {runs_dir}", hint=hint)


def latest_run(runs_dir: Path, verb: str, accept: Callable[[dict[str, Any]], bool] = lambda _: True) -> Path:
    """Return the newest run of `verb` whose record satisfies `accept`.

    Raises
    ------
    UsageError    there is none
    """
    for folder in reversed(list_runs(runs_dir)):
        record = read_run(folder)
        if record["verb"] == verb and accept(record):
            return folder
    raise UsageError(f"no run of {verb} that fits in {runs_dir}", hint=f"run `embedpipe {verb}` first")

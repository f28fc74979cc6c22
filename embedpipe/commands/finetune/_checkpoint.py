"""Checkpoints of an unfinished run: its options and the state of training, in one file that is replaced atomically.

>>> with unfinished_run(Path("runs"), resume=True, options=options, defaults={}) as unfinished:
...     train(..., resume=unfinished.state, checkpoint=unfinished.write)
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from embedpipe.errors import Interrupted, ModelMismatch, Stopped, UsageError
from embedpipe.runs import find_unfinished, lock_unfinished, new_name, unfinished_folder
from embedpipe.storage import write_atomic
from embedpipe.training import Ranks

VERB, CHECKPOINT, FORMAT = "finetune", "checkpoint.pt", 1


@dataclass(frozen=True)
class UnfinishedRun:
    """A run in progress, locked by this process.

    options : dict          the options that change the result
    state : dict or None    of training, from the last checkpoint
    source : dict or None   what `choose_source` reported when the run began
    """

    folder: Path
    name: str
    ranks: Ranks
    options: Mapping[str, Any]
    state: Mapping[str, Any] | None = field(default=None, repr=False)
    source: Mapping[str, Any] | None = None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; only the first rank does so."""
        if self.ranks.first:
            content = {"format": FORMAT, "options": dict(self.options), "state": dict(state), "source": self.source}
            write_atomic(self.folder / CHECKPOINT, partial(_save, content))


@contextmanager
def unfinished_run(
    runs_dir: Path, *, resume: bool | str, options: Mapping[str, Any], defaults: Mapping[str, Any], ranks: Ranks
) -> Iterator[UnfinishedRun]:
    """Begin a run or resume one, and hold it until it is saved.

    Parameters
    ----------
    resume : bool or str    False: begin a run; True: resume the latest; a name, its id or a prefix: resume that one

    Raises
    ------
    UsageError              there is no such run, or an option is neither the default nor that of the run
    ModelMismatch           the checkpoint cannot be read, or needs a removed option
    Stopped, Interrupted    by a signal; the hint is the command that resumes
    """
    text = resume if isinstance(resume, str) else None
    is_new = resume is False
    name = ranks.broadcast(lambda: new_name(VERB) if is_new else find_unfinished(runs_dir, VERB, text))
    with lock_unfinished(runs_dir, name) if ranks.first else nullcontext(unfinished_folder(runs_dir, name)) as folder:
        path = folder / CHECKPOINT
        stored: dict[str, Any] = {"options": options, "state": None, "source": None} if is_new else _read(path, name)
        _check_unchanged(name, stored["options"], options, defaults)
        try:
            yield UnfinishedRun(folder, name, ranks, stored["options"], stored["state"], stored["source"])
        except (Stopped, KeyboardInterrupt) as exc:
            if not path.exists():
                raise
            kind = Stopped if isinstance(exc, Stopped) else Interrupted
            hint = f"`embedpipe finetune --resume {name.rsplit('-', 1)[-1]}` continues"
            raise kind("stopped between two steps; a checkpoint is written", hint=hint, run=name) from exc


def _save(content: Mapping[str, Any], stream: IO[bytes]) -> None:
    try:
        torch.save(content, stream)
    except RuntimeError as exc:  # torch closes its archive after a failed write too, and that error hides the first
        raise (exc.__context__ if isinstance(exc.__context__, OSError) else exc) from None


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ModelMismatch(f"{path} is not a readable checkpoint: {reason}", hint="start a new run") from exc
    noise, activations = content["options"].pop("noise", 0.0), (content["source"] or {}).get("activations", {})
    removed = f"--noise {noise:g}" if noise else "packed activations" if activations.get("packed") else ""
    if removed:
        raise ModelMismatch(f"cannot resume {name}: it uses {removed}, which was removed", hint="start a new run")
    return content


def _check_unchanged(
    name: str, stored: Mapping[str, Any], options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse options that are neither the default nor those that the run began with."""
    changed = [key for key, value in options.items() if value not in (defaults.get(key), stored.get(key))]
    if changed:
        flags = {key: "RUN" if key == "run" else "--" + key.replace("_", "-") for key in changed}
        text = ", ".join(f"{flags[key]} is {stored.get(key)} in the run, got {options[key]}" for key in changed)
        raise UsageError(
            f"cannot change options when resuming {name}: {text}", hint="leave them out, or start a new run"
        )

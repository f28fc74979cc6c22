"""An unfinished run: the options it began with and its last checkpoint, in one file that is replaced whole.

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
from embedpipe.runs import find_unfinished, hold_unfinished, new_name, unfinished_folder
from embedpipe.storage import publish
from embedpipe.training import Ranks

VERB, CHECKPOINT, FORMAT = "finetune", "checkpoint.pt", 1
ALONE = Ranks()


@dataclass(frozen=True)
class Unfinished:
    """A run under way, held by this process.

    options : dict          what shapes the result, by option
    state : dict or None    of training, as it was last written
    source : dict or None   what it trains on, as `choose_source` told
    """

    folder: Path
    name: str
    options: Mapping[str, Any]
    state: Mapping[str, Any] | None = field(default=None, repr=False)
    ranks: Ranks = ALONE
    source: Mapping[str, Any] | None = None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; the first rank does."""
        if not self.ranks.first:
            return
        whole = {"format": FORMAT, "options": dict(self.options), "state": dict(state), "source": self.source}
        publish(self.folder / CHECKPOINT, partial(_save, whole))


@contextmanager
def unfinished_run(
    runs_dir: Path, *, resume: bool | str, options: Mapping[str, Any], defaults: Mapping[str, Any], ranks: Ranks = ALONE
) -> Iterator[Unfinished]:
    """Begin a run, or take up the latest unfinished one or the one that `resume` names, until it is saved.

    Raises
    ------
    UsageError              no such run, or options that are neither the default nor those of the run
    ModelMismatch           the checkpoint cannot be read
    Stopped, Interrupted    by a signal; the hint says how to go on
    """
    again = resume is not False
    text = resume if isinstance(resume, str) else None
    name = ranks.tell(lambda: find_unfinished(runs_dir, VERB, text) if again else new_name(VERB))
    with hold_unfinished(runs_dir, name) if ranks.first else nullcontext(unfinished_folder(runs_dir, name)) as folder:
        path = folder / CHECKPOINT
        stored: dict[str, Any] = _read(path, name) if again else {"options": options, "state": None, "source": None}
        _refuse_changes(name, stored["options"], options, defaults)
        try:
            yield Unfinished(folder, name, stored["options"], stored["state"], ranks, stored["source"])
        except (Stopped, KeyboardInterrupt) as exc:
            if not path.exists():
                raise
            kind = Stopped if isinstance(exc, Stopped) else Interrupted
            hint = f"`embedpipe finetune --resume {name.rsplit('-', 1)[-1]}` goes on"
            raise kind("stopped between two steps; a checkpoint is written", hint=hint, run=name) from exc


def _save(whole: Mapping[str, Any], stream: IO[bytes]) -> None:
    try:
        torch.save(whole, stream)
    except RuntimeError as exc:  # torch's writer ends its archive even after a refusal, and then hides it
        raise (exc.__context__ if isinstance(exc.__context__, OSError) else exc) from None


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ModelMismatch(f"{path} is no checkpoint that can be read: {reason}", hint="start a new run") from exc
    noise, activations = found["options"].pop("noise", 0.0), (found["source"] or {}).get("activations", {})
    removed = f"--noise {noise:g}" if noise else "packed activations" if activations.get("packed") else ""
    if removed:
        raise ModelMismatch(f"cannot resume {name}: {removed} was removed", hint="start a new run")
    return found


def _refuse_changes(
    name: str, stored: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    changed = [key for key, value in given.items() if value not in (defaults.get(key), stored.get(key))]
    if changed:
        told = ", ".join(f"{_flag(key)} {given[key]} instead of {stored.get(key)}" for key in changed)
        raise UsageError(
            f"{name} goes on with its own options, found {told}", hint="leave them out, or start a new run"
        )


def _flag(key: str) -> str:
    return "RUN" if key == "run" else "--" + key.replace("_", "-")

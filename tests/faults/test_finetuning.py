"""Fine-tuning is killed, stopped and refused its checkpoints: the last good one stays, and a resume ends with the same bits."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embedpipe.runs import list_runs

from ..conftest import TINY, write_photos
from ._tier import tier
from .checking import problem_of
from .conftest import Tally
from .extracting import await_output, check_ended, envelope, kill
from .processes import CALLS, Trial, Warm, calls_below, was_hit

CODES = {signal.SIGTERM: 5, signal.SIGINT: 130}
EPOCHS = 3
OPTIONS = [
    "--unfreeze",
    "layer4",
    "--epochs",
    EPOCHS,
    "--batch-size",
    8,
    "--ema",
    0.9,
    "--mixup",
    0.2,
    "--augment",
    "flip",
]
MACHINE = ["--device", "cpu", "--workers", 1, "--json"]


@dataclass
class Tuning:
    """A fitted head to start from, and the files that an unbroken fine-tuning ends with.

    seconds : from the first checkpoint to the last word
    """

    warm: Warm
    folder: Path
    whole: tuple[bytes, bytes] = field(init=False)
    seconds: float = 0

    def __post_init__(self) -> None:
        write_photos(self.folder / "photos", 12)
        for argv in (["extract", "photos", *TINY, "--workers", 1, "--device", "cpu"], ["fit-head", "--l2", 0.1]):
            trial = self.warm.start(self.folder, *argv)
            assert trial.end() == 0, trial.err
        trial = self.start(self.copy("whole"))
        self.await_checkpoint(trial)
        started = time.monotonic()
        await_output(trial)
        self.seconds = time.monotonic() - started
        assert trial.wait() == 0, trial.err
        self.whole = self.files_of(trial.folder)

    def copy(self, name: str) -> Path:
        """Return a folder in which nothing has been fine-tuned."""
        for part in ("cache", "runs"):
            shutil.copytree(self.folder / part, self.folder / name / part)
        return self.folder / name

    def start(self, folder: Path, *more: object, go: bool = True) -> Trial:
        trial = self.warm.start(folder, "finetune", *(more or OPTIONS), *MACHINE)
        return trial.go() if go else trial

    def await_checkpoint(self, trial: Trial) -> None:
        until = time.monotonic() + 60
        while not self.checkpoints(trial.folder):
            assert time.monotonic() < until, trial.err
            time.sleep(0.001)

    def checkpoints(self, folder: Path) -> list[Path]:
        return list(folder.glob("runs/.unfinished-*/checkpoint.pt"))

    def files_of(self, folder: Path) -> tuple[bytes, bytes]:
        [run] = [run for run in list_runs(folder / "runs") if "finetune" in run.name]
        return (run / "model" / "model.safetensors").read_bytes(), (run / "head.safetensors").read_bytes()

    def check_resumed(self, folder: Path) -> None:
        """A resume, or where no checkpoint was written the same command, ends with the same bits and leaves nothing behind."""
        finished = any("finetune" in run.name for run in list_runs(folder / "runs"))
        if not finished:
            trial = self.start(folder, *(["--resume"] if self.checkpoints(folder) else ()))
            await_output(trial)
            kill(trial)
            assert envelope(trial)["ok"], trial.out
        assert self.files_of(folder) == self.whole, "the weights differ from those of an unbroken run"
        left = [path.name for path in (folder / "runs").glob(".*")]
        assert finished or not left, f"left behind: {left}"  # the next one removes what a kill after the rename left


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    """Processes with everything imported, forked from one."""
    packages = (
        "commands.extract",
        "commands.fit_head",
        "commands.finetune._training",
        "training",
        "classifier",
        "cli.finetune",
    )
    with Warm("embedpipe.cli:main", "torch", "timm", "h5py", *(f"embedpipe.{name}" for name in packages)) as warm:
        yield Tuning(warm, tmp_path_factory.mktemp("tuning"))


def test_sigkill(tuning: Tuning, full: bool, tally: Tally) -> None:
    """Random SIGKILLs of fine-tunings and of their resumes."""
    chance, number = random.Random(0), 0
    while tally.trials < (60 if full else 3):
        folder, number = tuning.copy(f"killed-{number}"), number + 1
        for _ in range(chance.randint(1, 3)):
            trial = tuning.start(folder, *(["--resume"] if tuning.checkpoints(folder) else ()))
            tuning.await_checkpoint(trial)
            time.sleep(chance.uniform(0, tuning.seconds))
            if kill(trial) == -signal.SIGKILL and not trial.out:
                tally.add(None, folder.name)
            else:
                break
        problem = problem_of(tuning.check_resumed, folder)
        if problem:
            tally.bad.append(f"{folder.name}: {problem}")
    tally.note = f"{number} fine-tunings"
    assert not tally.bad, "\n".join(tally.bad)


@pytest.mark.parametrize("number", tier([signal.SIGINT], list(CODES)), ids=lambda number: number.name)
def test_stopped(tuning: Tuning, full: bool, tally: Tally, number: signal.Signals) -> None:
    """SIGTERM or SIGINT in the middle of a fine-tuning."""
    chance = random.Random(1)
    for k in range(5 if full else 1):
        folder = tuning.copy(f"{number.name}-{k}")
        trial = tuning.start(folder)
        tuning.await_checkpoint(trial)
        time.sleep(chance.uniform(0, 0.6 * tuning.seconds))
        trial.signal(number)
        code = trial.wait()
        hint = None if "finetune --resume" in trial.err else f"no word of --resume: {trial.err}"
        ended = problem_of(check_ended, trial, code, CODES[number])
        tally.add(ended or hint or problem_of(tuning.check_resumed, folder), k)
    assert not tally.bad, "\n".join(tally.bad)


@pytest.mark.usefixtures("strace")
def test_publishing(tuning: Tuning, full: bool, tally: Tally) -> None:
    """SIGKILL and ENOSPC at the calls that publish checkpoints and the run."""
    folder = tuning.copy("traced")
    trial = tuning.start(folder, go=False)
    assert trial.attach(folder / "log", "-y", f"--trace={CALLS}").end() == 0, trial.err
    calls = calls_below(folder / "log", folder / "runs")
    plan = [(call, fault) for call in calls for fault in ("KILL", "ENOSPC") if call.name not in ("close", "openat")]
    for k, (call, fault) in enumerate(random.Random(0).sample(plan, 60 if full else 3)):
        folder = tuning.copy(f"hurt-{k}")
        trial = tuning.start(folder, go=False)
        code = trial.attach(folder / "log", *call.inject(fault)).end()
        if was_hit(folder / "log", folder / "runs"):  # decoders start when they will: the count of calls may be another
            wanted = {"KILL": -9, "ENOSPC": 74}[fault]
            ended = None if code == wanted else f"ended {code}: {trial.err}"
            tally.add(ended or problem_of(tuning.check_resumed, folder), f"{fault} at {call.line}")
    tally.note = f"of {len(plan)}"
    assert tally.trials
    assert not tally.bad, "\n".join(tally.bad)

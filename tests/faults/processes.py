"""Processes with injected faults: forked from one that has everything imported, traced and injected by strace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).parents[2]
# What can leave something behind on a disk. `close` and `flock` fail on network file systems.
CALLS = (
    "openat,write,pwrite64,writev,pwritev,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,"
    "symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate,truncate,fallocate,chmod,fchmod,fchmodat,flock,close"
)


@dataclass
class Trial:
    """One process, stopped before its first step.

    Attributes
    ----------
    pid : int
    out, err : what it wrote so far
    """

    pid: int
    folder: Path
    ended: Callable[[], int]
    strace: subprocess.Popen[str] | None = None
    over: bool = False

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def said(self) -> list[Any]:
        """The whole lines of its standard output, as JSON."""
        return [json.loads(line) for line in self.out.splitlines(keepends=True) if line.endswith("\n")]

    def attach(self, log: Path, *options: str) -> Self:
        """Let strace follow its first thread, which does all publishing, from the first step on; decoders are left alone."""
        command = ["strace", "-o", str(log), "-p", str(self.pid), *options]
        self.strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.strace.stderr is not None
        answer = self.strace.stderr.readline()
        assert "attached" in answer, answer
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def go(self) -> Self:
        self.signal(signal.SIGCONT)
        return self

    def wait(self) -> int:
        """Return its exit code, negative for a signal."""
        code, self.over = self.ended(), True
        if self.strace:
            self.strace.communicate()
        return code

    def end(self) -> int:
        return self.go().wait()


class Warm:
    """A process that forks trials; see `warm`."""

    def __init__(self, entry: str, *needed: str) -> None:
        self._latest: Trial | None = None
        command = [sys.executable, "-m", "tests.faults.warm", entry, *needed]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY, env=environment, bufsize=1
        )

    def start(self, folder: Path, *argv: object, **environment: str) -> Trial:
        """Fork a trial that runs in `folder`, where its output goes too."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        folder.mkdir(parents=True, exist_ok=True)
        places = {"folder": str(folder), "out": str(folder / "out"), "err": str(folder / "err")}
        request = {"argv": [str(one) for one in argv], "environment": environment, **places}
        asked.write(json.dumps(request) + "\n")
        self._latest = Trial(int(answers.readline()), folder, lambda: int(answers.readline()))
        return self._latest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._latest and not self._latest.over:
            self._latest.signal(signal.SIGKILL)
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(30)
        self._process.stdout.close()  # type: ignore[union-attr]


def start_fresh(folder: Path, *argv: object, **environment: str) -> Trial:
    """Start `python -m embedpipe` as a user does; it runs at once."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "embedpipe", *map(str, argv)]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=known)
    return Trial(process.pid, folder, process.wait)


@dataclass(frozen=True)
class Call:
    """One system call of a process: the `number`-th of its name."""

    name: str
    number: int
    line: str

    def inject(self, fault: str) -> tuple[str, str]:
        """Return the options of strace that inject a fault into this call: KILL, or the name of an error."""
        what = "signal=KILL" if fault == "KILL" else f"error={fault}"
        return "-y", f"--inject={self.name}:{what}:when={self.number}"


def calls_below(log: Path, root: Path) -> list[Call]:
    """Return the calls in a log of `strace -y` that name a file below `root`.

    A close counts only where the file was open for writing.
    """
    counted: Counter[str] = Counter()
    writable: dict[str, bool] = {}
    found = []
    for line in log.read_text().splitlines():
        match = re.match(r"(\w+)\((\d*)", line)
        if not match:
            continue
        name, descriptor = match.groups()
        counted[name] += 1
        if name == "openat" and (opened := re.search(r"= (\d+)<", line)):
            writable[opened[1]] = "O_RDONLY" not in line
        if str(root) in line and (name != "close" or writable.get(descriptor)):
            found.append(Call(name, counted[name], line))
    return found


def was_hit(log: Path, root: Path) -> bool:
    """Whether the injected fault met a call that names a file below `root`."""
    hurt = [line for line in log.read_text().splitlines() if "(INJECTED)" in line or line.endswith("= ?")]
    return any(str(root) in line for line in hurt)


def last_lines(trial: Trial) -> Sequence[str]:
    """Return the lines on standard error that report an error."""
    return [line for line in trial.err.splitlines() if line.startswith("error: ")]

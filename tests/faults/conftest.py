"""Counts of trials, and the processes that faults are injected into."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ._tier import FULL
from .extracting import Extraction
from .processes import Warm
from .publishing import publish_all, space_of


@dataclass
class Tally:
    """What a test tried and found.

    Attributes
    ----------
    bad : one line for each bad state
    """

    name: str
    trials: int = 0
    bad: list[str] = field(default_factory=list)
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0

    def add(self, problem: str | None, where: object) -> None:
        """Count one trial, and its problem if it has one."""
        self.trials += 1
        if problem:
            self.bad.append(f"{where}: {problem}")


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to try everything."""
    return FULL


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """A count that is printed at the end; the first line of the test's docstring names it."""
    kept = Tally((request.function.__doc__ or request.node.name).splitlines()[0].rstrip("."))
    yield kept
    kept.seconds = time.monotonic() - kept.started
    note = f" ({kept.note})" if kept.note else ""
    line = f"{kept.trials:7} {len(kept.bad):5} {kept.seconds:8.1f}  {kept.name}{note}"
    request.node.user_properties.append(("tally", line))  # travels from a worker of xdist to who prints


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    ended = [report for report in reports if getattr(report, "when", "") == "teardown"]
    lines = [line for report in ended for name, line in report.user_properties if name == "tally"]
    if lines:
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join([f"{'trials':>7} {'bad':>5} {'seconds':>8}", *lines]))


@pytest.fixture(scope="session")
def publisher() -> Iterator[Warm]:
    """Processes that publish without torch."""
    with Warm("tests.faults.publishing:main") as warm:
        yield warm


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """features.h5 of an unbroken publisher."""
    root = tmp_path_factory.mktemp("whole")
    publish_all(root, lambda _: None)
    return space_of(root).features_path.read_bytes()


@pytest.fixture(scope="session")
def command_line() -> Iterator[Warm]:
    """The real command line, everything imported."""
    packages = ("commands.extract", "inference", "features", "backbones", "cache", "images", "cli.extract")
    with Warm("embedpipe.cli:main", "torch", "timm", "h5py", *(f"embedpipe.{name}" for name in packages)) as warm:
        yield warm


@pytest.fixture(scope="session")
def extraction(command_line: Warm, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """Photos, and what an unbroken extraction of them gives."""
    return Extraction(command_line, tmp_path_factory.mktemp("extraction"))


@pytest.fixture(scope="session")
def strace(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where system calls cannot be traced."""
    if not shutil.which("strace"):
        pytest.skip("needs strace, which is not installed")
    with Warm("builtins:len") as warm:
        folder: Path = tmp_path_factory.mktemp("strace")
        trial = warm.start(folder)
        try:
            trial.attach(folder / "log")
        except AssertionError as refusal:
            pytest.skip(f"needs strace to attach to a process: {refusal}")
        finally:
            trial.end()

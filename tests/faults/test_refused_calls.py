"""Every publishing system call is killed or refused once: nothing that was safe is lost, and a resume ends the same."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from .checking import check_no_trace, check_plain, check_published, check_resumed, problem_of
from .conftest import Tally
from .extracting import Extraction, check_killed
from .processes import CALLS, Call, Trial, Warm, calls_below, last_lines, was_hit

pytestmark = pytest.mark.usefixtures("strace")
FAULTS = ("KILL", "ENOSPC", "EIO")
# The name of the holder in the lock file is optional, and without an exclusive lock only merging is forbidden.
# A close that strace refuses is not executed: the lock stays held, and this process finds itself busy (75).
COURTESY = ("ftruncate", "pwrite64", "flock", "close")
# Graphs and measurements only save time, and a call that fails in the unbroken run looks for something that may be absent.
SPARED = ("/cache/graphs/", " = -1 E")


def baseline(publisher: Warm, folder: Path, kind: str) -> list[Call]:
    root = folder / "root"
    trial = publisher.start(folder, kind, root)
    root.mkdir()
    assert trial.attach(folder / "log", "-y", f"--trace={CALLS}").end() == 0, trial.err
    return calls_below(folder / "log", root)


def hurt(publisher: Warm, folder: Path, kind: str, call: Call, fault: str) -> tuple[Trial, int]:
    """Run the publisher with one call hurt; the log must show that it was."""
    trial = publisher.start(folder, kind, folder / "root")
    (folder / "root").mkdir()
    code = trial.attach(folder / "log", *call.inject(fault)).end()
    assert was_hit(folder / "log", folder / "root"), f"{call} was not hit"
    return trial, code


def outcome_of(trial: Trial, code: int, call: Call, fault: str) -> str | None:
    """Return what is wrong with the way in which a process ended."""
    if fault == "KILL":
        return None if code == -9 else f"ended {code}"
    if call.name in COURTESY and ".lock" in call.line and code in (0, 75):
        return None
    if code == 0:
        return None if any(text in call.line for text in SPARED) else "nobody noticed"
    if code != 74 or len(last_lines(trial)) != 1 or "Traceback" in trial.err:
        return f"ended {code}: {trial.err}"
    return None


def sample(full: bool, population: Sequence[tuple[Call, str]], most: int) -> Sequence[tuple[Call, str]]:
    return population if full else random.Random(0).sample(population, most)


def test_publisher(publisher: Warm, tmp_path: Path, full: bool, whole: bytes, tally: Tally) -> None:
    """SIGKILL, ENOSPC, EIO at every publishing call of the publisher."""
    calls = baseline(publisher, tmp_path / "baseline", "ours")
    plan = [(call, fault) for call in calls for fault in FAULTS]
    for number, (call, fault) in enumerate(sample(full, plan, 20)):
        folder = tmp_path / str(number)
        trial, code = hurt(publisher, folder, "ours", call, fault)
        problem = (
            outcome_of(trial, code, call, fault)
            or problem_of(check_published, folder / "root", trial.said)
            or (problem_of(check_no_trace, folder / "root") if code == 74 else None)
            or problem_of(check_resumed, folder / "root", whole)
        )
        tally.add(problem, f"{fault} at {call.line}")
    tally.note = f"{len(calls)} calls"
    assert not tally.bad, "\n".join(tally.bad)


def test_the_harness_finds_the_fault_of_plain_appending(
    publisher: Warm, tmp_path: Path, full: bool, tally: Tally
) -> None:
    """The same on plain append-and-flush HDF5: must be bad."""
    calls = baseline(publisher, tmp_path / "baseline", "plain")
    plan = [(call, "KILL") for call in calls if call.name == "pwrite64"]
    for number, (call, fault) in enumerate(sample(full, plan, 40)):
        folder = tmp_path / str(number)
        trial, _ = hurt(publisher, folder, "plain", call, fault)
        tally.add(problem_of(check_plain, folder / "root", trial.said), call.line)
    tally.note = f"{len(calls)} calls"
    assert tally.bad


def test_command_line(extraction: Extraction, tmp_path: Path, full: bool, tally: Tally) -> None:
    """The same at a sample of the publishing calls of the real command line."""
    first = tmp_path / "baseline"
    trial = extraction.start(first, first / "cache", go=False)
    assert trial.attach(first / "log", "-y", f"--trace={CALLS}").end() == 0, trial.err
    calls = calls_below(first / "log", first / "cache")
    plan, wanted = [(call, fault) for call in calls for fault in FAULTS], 20 if full else 2
    for number, (call, fault) in enumerate(random.Random(0).sample(plan, 3 * wanted)):
        if tally.trials == wanted:
            break
        folder = tmp_path / str(number)
        cache, log = folder / "cache", folder / "log"
        trial = extraction.start(folder, cache, go=False)
        code = trial.attach(log, f"--trace={CALLS}", *call.inject(fault)).end()
        if not was_hit(log, cache):  # torch opened one file more or less than before
            continue
        committed = set(re.findall(r"rename\(.*shards/(\w[^\"]+)\"\) += 0", log.read_text()))
        problem = (
            outcome_of(trial, code, call, fault)
            or problem_of(check_killed, extraction, cache, committed)
            or problem_of(extraction.check_resumed, folder, cache)
        )
        tally.add(problem, f"{fault} at {call.line}")
    tally.note = f"{len(calls)} calls"
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.trials == wanted, "too few faults met the cache"

"""The power is cut at every moment of a recorded trace: nothing that was said to be safe is lost, and each fsync is needed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, dropwhile, islice
from pathlib import Path
from typing import Any

import pytest

from .checking import check_plain, check_published, check_resumed, problem_of
from .conftest import Tally
from .power import STRACE, Disk, Step, Tree, lay_out, read_trace, read_tree, site_of, without
from .processes import Call, Warm

pytestmark = pytest.mark.usefixtures("strace")
Lives = Sequence[Sequence[Step]]  # traces of processes that worked in the same folder, one killed after the other
OUTSIDE = "../.."  # the folder that holds the disk: not modelled


def record(publisher: Warm, folder: Path, kind: str, *options: str) -> list[Step]:
    """Return the trace of one process that publishes below folder/disk/home, which is not there yet."""
    (folder / "disk").mkdir(parents=True, exist_ok=True)
    trial = publisher.start(folder, kind, folder / "disk" / "home", "labelled")
    code = trial.attach(folder / "log", *STRACE, *options).end()
    assert code == (-9 if options else 0), trial.err
    return read_trace(folder / "log")


def killed_and_resumed(publisher: Warm, folder: Path, fsync: int) -> Lives:
    """Kill a process as it enters its n-th fsync, and let a second one resume."""
    _, kill = Call("fsync", fsync, "").inject("KILL")
    return record(publisher, folder, "ours", kill), record(publisher, folder, "ours")


def moments(lives: Lives, root: Path, every: bool = True) -> Iterator[Disk]:
    """Yield the disk after each step of the last process; or only where something was said or is about to be removed."""
    disk = Disk(root)
    *killed, last = lives
    for steps in killed:
        for step in steps:
            disk.do(step)
        disk.restart()
    for step in last:
        if every or step.call == "unlink":
            yield disk
        heard = len(disk.said)
        disk.do(step)
        if not every and len(disk.said) > heard:
            yield disk
    yield disk


def states(disks: Iterable[Disk], more: int) -> Iterator[tuple[Tree, list[dict[str, Any]]]]:
    """Yield each distinct state that a power cut may leave, with what had been said."""
    chance, seen = random.Random(0), set()
    for disk in disks:
        for tree in disk.outcomes(chance, more):
            state = hash((repr(tree), len(disk.said)))
            if state not in seen:
                seen.add(state)
                yield tree, list(disk.said)


def problems(
    found: Iterable[tuple[Tree, list[dict[str, Any]]]], place: Path, check: Callable[..., None]
) -> Iterator[str | None]:
    """Lay each state out on a real disk, at a fresh path, and check it."""
    for number, (tree, said) in enumerate(found):
        root = place / f"state-{number}"
        lay_out(tree, root)
        try:
            yield problem_of(check, root / "home", said)
        finally:
            shutil.rmtree(root)


def fsyncs(steps: Sequence[Step]) -> int:
    return sum(step.call == "fsync" for step in steps)


def test_unbroken(publisher: Warm, tmp_path: Path, full: bool, whole: bytes, tally: Tally) -> None:
    """Power cut at every moment of an unbroken run; every tenth time a resume."""
    lives = [record(publisher, tmp_path, "ours")]
    assert list(moments(lives, tmp_path / "disk"))[-1].left(lambda: "kept") == read_tree(tmp_path / "disk")
    more = 1000 // len(lives[0]) + 1 if full else 0
    number = count()

    def check(root: Path, said: list[dict[str, Any]]) -> None:
        check_published(root, said)
        if next(number) % 10 == 0:
            root.mkdir(exist_ok=True)
            check_resumed(root, whole)

    for problem in problems(states(moments(lives, tmp_path / "disk", every=full), more), tmp_path, check):
        tally.add(problem, f"state {tally.trials}")
    tally.note = f"{len(lives[0])} calls"
    assert not tally.bad, "\n".join(tally.bad)


def test_killed_before(publisher: Warm, tmp_path: Path, full: bool, tally: Tally) -> None:
    """Power cut at every moment at which a resumed run, killed once at an fsync, said that something is safe."""
    number = fsyncs(record(publisher, tmp_path / "unbroken", "ours"))
    for fsync in range(1, number + 1 if full else 2):
        folder = tmp_path / str(fsync)
        lives = killed_and_resumed(publisher, folder, fsync)
        for problem in problems(states(moments(lives, folder / "disk", every=False), 0), folder, check_published):
            tally.add(problem, f"killed at fsync {fsync}")
    assert not tally.bad, "\n".join(tally.bad)


def test_each_fsync_is_needed(publisher: Warm, tmp_path: Path, full: bool, tally: Tally) -> None:
    """Removing one fsync from the code: must be bad each time."""
    first = tmp_path / "unbroken"
    unbroken = record(publisher, first, "ours")
    traces: list[tuple[Path, Lives]] = [(first / "disk", [unbroken])]
    for fsync in range(1, fsyncs(unbroken) + 1 if full else 0):
        folder = tmp_path / str(fsync)
        traces.append((folder / "disk", killed_and_resumed(publisher, folder, fsync)))
    sites = {site_of(step) or OUTSIDE for _, lives in traces for steps in lives for step in steps}
    sites = {site for site in sites if not site.endswith(OUTSIDE) and (full or "_write" in site)}
    unneeded = [site for site in sorted(sites) if not is_needed(site, traces, tmp_path, tally)]
    tally.note = f"{len(sites)} lines of code, {len(traces)} traces"
    assert not unneeded, "\n".join(unneeded)


def is_needed(site: str, traces: Sequence[tuple[Path, Lives]], place: Path, tally: Tally) -> bool:
    """Whether the loss of one line of code is noticed in any of the traces."""
    for root, lives in traces:
        if not any(site_of(step) == site for steps in lives for step in steps):
            continue
        lacking = [without(steps, site) for steps in lives]
        later = dropwhile(lambda disk: site not in disk.sites, moments(lacking, root, every=False))
        for problem in problems(states(later, 0), place, check_published):
            if problem:
                tally.add(problem, site)
                return True
    return False


@pytest.mark.parametrize("fates", [("kept",), ("kept", "lost", "torn")], ids=["kill", "power cut"])
def test_the_harness_finds_the_fault_of_plain_appending(
    publisher: Warm, tmp_path: Path, full: bool, tally: Tally, fates: Sequence[str]
) -> None:
    """A kill, then a power cut, at every moment of plain append-and-flush HDF5: must be bad both times."""
    steps, chance = record(publisher, tmp_path, "plain"), random.Random(0)
    disks = islice(moments([steps], tmp_path / "disk"), 0, None, 1 if full else 6)
    found = ((disk.left(lambda: chance.choice(fates)), list(disk.said)) for disk in disks)
    for number, problem in enumerate(problems(found, tmp_path, check_plain)):
        tally.add(problem, f"state {number}")
    tally.note = f"{len(steps)} calls, {' or '.join(fates)}"
    assert tally.bad

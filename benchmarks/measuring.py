"""What all benchmarks share: ways in processes of their own, interleaved; medians with their spread; one table.

A script that measures in processes gives its ways as functions of keyword arguments that return a dict:

>>> if not answered({"ours": ours, "theirs": theirs}):      # this process was started to run one way
...     main()                                              # this one starts them: `run_way(__file__, "ours", ...)`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")
Way = Callable[..., dict[str, Any]]

CHILD = "--run-way"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
EXECUTORS = ("auto", "eager", "compile", "openvino")
VECTORS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of the values of several repeats."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 1) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}-{self.largest:.{digits}f})"


def interleave(ways: Mapping[str, Callable[[], Found]], repeats: int) -> dict[str, list[Found]]:
    """Run every way once, then every way again: what else the machine does falls on all of them."""
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, run in ways.items():
            say(f"repeat {repeat + 1} of {repeats}: {name}")
            found[name].append(run())
    return found


def one_or_more(text: str) -> int:
    """Return the number that an option names."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of 1 or more")
    return int(text)


def say(text: str) -> None:
    """Tell how far we are, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], *notes: str) -> None:
    """Print a Markdown table, its title above and its notes below."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(f"\n{title}, {describe_machine()}\n", *lines, "", *(f"* {note}" for note in notes), sep="\n", flush=True)


def describe_machine() -> str:
    """Return what the figures depend on: cores and processor."""
    name = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{count_cores()} cores ({name})"


def vector_flags() -> list[str]:
    """Return the vector instructions of the processor that inference speed depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in VECTORS if flag in flags]


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_way(script: str, way: str, *, sample_s: float = 1.0, **options: Any) -> dict[str, Any]:
    """Run one way of a script in a process of its own, with torch's threads and every cache as a new user has them.

    Returns
    -------
    dict    what the way returned; `whole_s` from the start of the process to that, less its `spare_s`; `peak_mib` of the tree
    """
    with tempfile.TemporaryDirectory() as memo:
        environment = {k: v for k, v in os.environ.items() if k not in THREADS}
        environment |= {"XDG_CACHE_HOME": memo, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, script, CHILD, way, json.dumps(options), str(time.monotonic())]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        with peak_memory(child.pid, sample_s) as peak:
            out, err = child.communicate()
    if child.returncode:
        raise SystemExit(f"{way} ended with {child.returncode}:\n{err[-2000:]}")
    return {**json.loads(out.splitlines()[-1]), "peak_mib": peak[0] / 2**20}


def answered(ways: Mapping[str, Way]) -> bool:
    """Run the way that this process was started for and print what it found; tell whether there was one."""
    if sys.argv[1:2] != [CHILD]:
        return False
    _, _, way, options, started = sys.argv
    found = ways[way](**json.loads(options))
    whole_s = time.monotonic() - float(started) - found.get("spare_s", 0)
    print(json.dumps({**found, "whole_s": whole_s}), flush=True)
    return True


@contextmanager
def peak_memory(pid: int, every_s: float) -> Iterator[list[int]]:
    """Sample the memory (bytes) of a process and all that it started; the only item is the most that was seen."""
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(every_s):
            peak[0] = max(peak[0], sum(_memory_of(one) for one in _tree_of(pid)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _memory_of(pid: int) -> int:
    """Return the proportional set size: pages that processes share are divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has gone
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _tree_of(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in _tree_of(child))]


def extract_steadily(data: str, backbone: Any, *, save: str | None = None, **options: Any) -> dict[str, Any]:
    """Extract into a fresh cache and tell the steady part from the whole.

    The clock of the steady part starts when `progress` first reports, with the executor chosen and warm, and ends when
    `extract` returns: decode, sha256 check, forward, commit and merge are in it, listing and hashing the files are not.

    Parameters
    ----------
    save : str    file for the features, in the order of the paths

    Returns
    -------
    dict    images, steady_s, extract_s, executor, bottleneck
    """
    import embedpipe as ep

    began: list[float] = []
    with tempfile.TemporaryDirectory() as cache:
        start = time.monotonic()
        features = ep.extract(
            data, backbone, cache_dir=cache, progress=lambda *_: began.append(time.monotonic()), **options
        )
        end, told = time.monotonic(), features.summary
        if told["failed"]:
            raise SystemExit(f"{len(told['failed'])} images failed, the first: {told['failed'][0]}")
        if save:
            save_features(save, features.paths(), features.arrays()[0])
    times = {"steady_s": end - began[0], "extract_s": end - start}
    return {"images": told["images"], **times, "executor": told["executor"], "bottleneck": told["bottleneck"]}


def save_features(file: str, paths: Sequence[object], features: Any) -> None:
    """Write features in the order of their paths, whatever order they came in."""
    import numpy as np

    order = sorted(range(len(paths)), key=lambda row: str(paths[row]))
    np.save(file, np.asarray(features, np.float32)[order])


@dataclass(frozen=True)
class Parity:
    """How far features are from others of the same images: the largest cosine distance, as they are and centred.

    Features of random weights point much the same way; centred on the mean of the others they don't, so that `centred` is
    the strict measure.
    """

    plain: float
    centred: float

    @classmethod
    def of(cls, features: Any, reference: Any) -> Parity:
        middle = reference.astype("float64").mean(0)
        return cls(_farthest(features, reference), _farthest(features - middle, reference - middle))


def _farthest(found: Any, reference: Any) -> float:
    """Return the largest cosine distance of a row, taken from the differences of unit vectors: 1 - cos would round."""
    import numpy as np

    ours, theirs = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (found, reference)
    )
    return float(((ours - theirs) ** 2).sum(1).max() / 2)

"""Which files a process opened, as the kernel saw it: HDF5 and decoders open theirs without Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

OPENED = re.compile(r'open(?:at)?\((?:[^",]+, )?"((?:[^"\\]|\\.)*)", (.*?)\) += (-?\d+)')
LOOKED = re.compile(r'(?:newfstatat|statx|stat|lstat)\((?:[^",]+, )?"((?:[^"\\]|\\.)*)"')


@cache
def need_strace() -> None:
    """Skip where processes cannot be traced."""
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("which files a process opens is read from strace: it is not installed, or tracing is forbidden")


def trace(code: str, *arguments: object, calls: str = "open,openat") -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python code under strace; return how it ended and the log of these system calls."""
    need_strace()
    log = Path(str(arguments[0])) / "strace.log"
    command = ["strace", "-ff", "-qq", "-s", "4096", "-e", f"trace={calls}", "-o", str(log)]
    command += [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    threads = sorted(log.parent.glob(f"{log.name}.*"))  # one log a thread: lines of several would be cut by each other
    text = "".join(path.read_text(errors="surrogateescape") for path in threads)
    for path in threads:
        path.unlink()
    return done, text


def opened(log: str) -> list[str]:
    """Return the paths that were opened."""
    return [path for path, _, result in OPENED.findall(log) if int(result) >= 0]


def looked_at(log: str) -> list[str]:
    """Return the paths of all stat calls."""
    return LOOKED.findall(log)

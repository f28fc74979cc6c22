"""Many fresh processes at the price of one import: every line of standard input forks one that calls the entry.

    python -m tests.faults.warm embedpipe.cli:main torch timm

A child stops itself before it calls, so that strace can be attached; SIGCONT lets it go. Two lines answer each request:
the process, and how it ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any


def main() -> Any:
    module, _, name = sys.argv[1].partition(":")
    entry = getattr(importlib.import_module(module), name)
    for needed in sys.argv[2:]:
        importlib.import_module(needed)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
            return entry(request["argv"])  # the child leaves by the way of any process: exit handlers and all
        os.waitpid(child, os.WUNTRACED)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for descriptor, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    sys.exit(main())

"""Does peak memory depend on the number of images?

The command line in a process of its own; proportional set sizes of it and all that it starts, sampled ten times a second.

python benchmarks/memory.py --sizes 1000 10000 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import EXECUTORS, Spread, interleave, one_or_more, peak_memory, print_table
from photos import make_photos

TARGET = 1.1


def measure(data: Path, options: argparse.Namespace) -> float:
    """Return the peak (MiB) of one extraction into a fresh cache."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "embedpipe", "extract", str(data), "--cache-dir", f"{name}/cache", "--json"]
        command += ["--backbone", options.backbone, "--weights", "none", "--executor", options.executor]
        environment = {**os.environ, "XDG_CACHE_HOME": f"{name}/memo"}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with peak_memory(child.pid, 0.1) as peak:
            code = child.wait()
    if code:
        raise SystemExit(f"embedpipe ended with {code}")
    return peak[0] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbone", default="timm:test_resnet", help="random weights; timm:resnet18 takes longer")
    parser.add_argument(
        "--executor", default="openvino", choices=EXECUTORS, help="auto may choose by the number of images"
    )
    options = parser.parse_args()
    folders = {size: make_photos(size) for size in options.sizes}
    ways = {str(size): (lambda data=data: measure(data, options)) for size, data in folders.items()}
    found = interleave(ways, options.repeats)
    base = found[str(options.sizes[0])]
    rows = []
    for name, peaks in found.items():
        ratios = Spread.of([peak / first for peak, first in zip(peaks, base, strict=True)])
        rows.append((name, Spread.of(peaks).text(0), ratios.text(3)))
    title = f"Peak memory of an extraction, {options.backbone} ({options.executor}), {options.repeats} repeats"
    print_table(title, ("photos", "peak, MiB", f"of {options.sizes[0]}"), rows, f"target: {TARGET}")


if __name__ == "__main__":
    main()

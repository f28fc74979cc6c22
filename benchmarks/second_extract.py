"""What a second extract costs: interleaved runs of the command line over fresh, unchanged and slightly changed folders.

python benchmarks/second_extract.py --images 500 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

BACKBONE = ["--backbone", "timm:test_resnet", "--weights", "none"]  # random weights: only time is measured


def write_images(folder: Path, numbers: range) -> None:
    """Write noisy JPEGs, 500 x 375, quality 90."""
    for k in numbers:
        path = folder / f"class{k % 5}" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def extract(data: Path, cache: Path) -> tuple[float, int]:
    """Run one extraction in a process of its own; return its seconds and what it computed."""
    command = [sys.executable, "-m", "embedpipe", "extract", str(data), *BACKBONE]
    command += ["--cache-dir", str(cache), "--json"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent / "memo")}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["data"]
    return found["seconds"], found["computed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"first": [], "second": [], "ten new": []}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as name:
            data, cache = Path(name) / "data", Path(name) / "cache"
            write_images(data, range(options.images))
            for step, wanted in (("first", options.images), ("second", 0), ("ten new", 10)):
                if step == "ten new":
                    write_images(data, range(options.images, options.images + 10))
                seconds, computed = extract(data, cache)
                assert computed == wanted, f"{step}: computed {computed}, expected {wanted}"
                times[step].append(seconds)
        print(f"repeat {repeat + 1} of {options.repeats} done", file=sys.stderr)
    first = statistics.median(times["first"])
    print(f"{'run':<10}{'median s':>10}{'min':>8}{'max':>8}{'of first':>10}")
    for step, values in times.items():
        middle = statistics.median(values)
        print(f"{step:<10}{middle:>10.2f}{min(values):>8.2f}{max(values):>8.2f}{middle / first:>10.3f}")


if __name__ == "__main__":
    main()

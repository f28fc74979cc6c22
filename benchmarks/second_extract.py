"""What a second extract costs: interleaved runs of the command line over fresh, unchanged and slightly changed folders.

Seconds are those of the whole process. Two more second runs, not timed, show that torch is not imported and (by strace, where
there is one) that no image is opened.

python benchmarks/second_extract.py --images 10000 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measuring import Spread, one_or_more, print_table, say
from photos import make_photos
from PIL import Image, ImageOps

CHANGED = 10
MOST_S, MOST_SHARE = 1.5, 0.02

SETTLED_S = (
    3.0  # a file is remembered once it is older than a tick of its times: photos are not written while they are read
)


class Extraction:
    """The command line over one folder, with a cache and a memo of its own."""

    def __init__(self, folder: Path, backbone: str) -> None:
        self.folder, self.data = folder, folder / "data"
        self._arguments = ["-m", "embedpipe", "extract", str(self.data), "--backbone", backbone, "--weights", "none"]
        self._arguments += ["--cache-dir", str(folder / "cache"), "--json"]
        self._environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "memo")}

    def run(self, *, wrapper: Sequence[str] = (), flags: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        command = [*wrapper, sys.executable, *flags, *self._arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self._environment, check=True)

    def timed(self, wanted: int) -> float:
        """Return the seconds of one run, which computes `wanted` rows."""
        start = time.monotonic()
        done = self.run()
        seconds = time.monotonic() - start
        computed = json.loads(done.stdout.splitlines()[-1])["data"]["computed"]
        if computed != wanted:
            raise SystemExit(f"computed {computed} rows, expected {wanted}")
        return seconds


def change(data: Path, images: int) -> None:
    """Mirror some images in place."""
    for path in sorted(data.glob("*/*.jpg"))[:images]:
        ImageOps.mirror(Image.open(path)).save(path, quality=90)


def prove(extraction: Extraction) -> list[str]:
    """Return what a second run did not do.

    Raises
    ------
    SystemExit    it did
    """
    imports = extraction.run(flags=["-X", "importtime"]).stderr
    if re.search(r"\|\s+torch$", imports, re.MULTILINE):
        raise SystemExit("the second run imported torch")
    notes = [
        f"the second run imported {imports.count('import time:') - 1} modules, torch not among them (-X importtime)"
    ]
    if not shutil.which("strace"):
        return [*notes, "no strace here: that no image is opened was not checked"]
    log = extraction.folder / "opened"
    extraction.run(wrapper=["strace", "-f", "-qq", "-e", "trace=open,openat,openat2", "-o", str(log)])
    lines = log.read_text().splitlines()
    images = [line for line in lines if re.search(r"\.jpg\"", line)]
    if images:
        raise SystemExit(f"the second run opened {len(images)} images, the first: {images[0]}")
    return [*notes, f"it opened {len(lines)} files, no image among them (strace)"]


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """Return seconds by step over a fresh copy of the photos, and what the second run did not do."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        extraction = Extraction(Path(name), options.backbone)
        shutil.copytree(make_photos(options.images), extraction.data)
        time.sleep(SETTLED_S)
        times = {"first": extraction.timed(options.images), "second": extraction.timed(0)}
        notes = prove(extraction)
        change(extraction.data, CHANGED)
        times[f"{CHANGED} changed"] = extraction.timed(CHANGED)
    return times, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbone", default="timm:test_resnet", help="random weights: only time is measured")
    parser.add_argument("--scratch", help="folder for copies of the photos and the cache (default: the system's)")
    options = parser.parse_args()
    runs: list[dict[str, float]] = []
    notes: list[str] = []
    for repeat in range(options.repeats):
        times, notes = measure(options)
        runs.append(times)
        say(f"repeat {repeat + 1} of {options.repeats}: {times}")
    rows = []
    for step in runs[0]:
        shares = Spread.of([times[step] / times["first"] for times in runs])
        rows.append((step, Spread.of([times[step] for times in runs]).text(2), shares.text(4)))
    print_table(
        f"A second extract, {options.images} photos, {options.backbone}, {options.repeats} repeats",
        ("run", "s, whole process", "of the first"),
        rows,
        f"target of the second: {MOST_S} s and {MOST_SHARE} of the first",
        *notes,
    )


if __name__ == "__main__":
    main()

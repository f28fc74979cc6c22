"""Does `--executor auto` take about as long as the best executor? Whole `embedpipe extract` processes, interleaved.

Each run has a cache folder of its own. `--memory kept` hands the records of earlier runs of the same model to the next
one, and runs the named executors first; `--memory fresh` starts every run without records. Results are appended to a
file, a line a run, and runs that it holds for this commit and processor are not repeated.

python benchmarks/executors.py --backbones resnet18 lite0 --images 100 700 3000 --memory kept --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import EXECUTORS, HERE, THREADS, Spread, describe_machine, one_or_more, print_table, say, vector_flags
from photos import SETS

NAMES = {"lite0": "timm:tf_efficientnet_lite0", "vit_small": "timm:vit_small_patch16_224"}
CELL = ("commit", "machine", "memory", "backbone", "images", "executor", "repeat")  # what identifies a line
UNSET = (*THREADS, "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
MOST_RATIO, MOST_S = 1.05, 6.0


def commit() -> str:
    """Return the commit that is measured, "+" where the working tree differs from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def extract(cell: dict[str, Any], data: Path, memory: Path) -> dict[str, Any]:
    """Run one extraction in a fresh cache, with the records in `memory` where they are kept."""
    with tempfile.TemporaryDirectory() as folder:
        graphs = Path(folder) / "cache" / "graphs"
        graphs.mkdir(parents=True)
        if cell["memory"] == "kept":
            for file in memory.glob("*.json"):
                shutil.copy(file, graphs)
        name = NAMES.get(cell["backbone"], f"timm:{cell['backbone']}")
        command = [sys.executable, "-m", "embedpipe", "extract", str(data), "--backbone", name, "--weights", "none"]
        command += ["--executor", cell["executor"], "--cache-dir", str(graphs.parent), "--json"]
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        environment |= {"XDG_CACHE_HOME": f"{folder}/user", "HF_HUB_OFFLINE": "1"}
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        wall_s = time.monotonic() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        if cell["memory"] == "kept":
            memory.mkdir(parents=True, exist_ok=True)
            for file in graphs.glob("*.json"):
                shutil.copy(file, memory)
    used = json.loads(done.stdout.splitlines()[-1])["data"]["executor"]
    return {**cell, "wall_s": wall_s, "used": used}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a line for each run, those of the results file first."""
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {tuple(one[name] for name in CELL): one for one in map(json.loads, lines)}
    executors = sorted(options.executors, key=lambda name: name == "auto")  # it may use what the others have recorded
    common = {"commit": commit(), "machine": machine(), "memory": options.memory}
    cells = [
        {**common, "backbone": backbone, "images": images, "executor": executor, "repeat": repeat}
        for repeat in range(options.repeats)
        for images in options.images
        for backbone in options.backbones
        for executor in executors
    ]
    for cell in cells:
        key = tuple(cell[name] for name in CELL)
        if key not in results:
            say(" ".join(str(cell[name]) for name in CELL[2:]))
            memory = options.results.with_suffix(".memory") / cell["backbone"]
            results[key] = extract(cell, SETS[options.set](cell["images"]), memory)
            with options.results.open("a") as file:
                file.write(json.dumps(results[key]) + "\n")
    return [results[tuple(cell[name] for name in CELL)] for cell in cells]


def machine() -> str:
    return f"{describe_machine()}, {' '.join(vector_flags()) or 'no vector instructions known'}"


def rows_of(results: list[dict[str, Any]]) -> list[list[object]]:
    """Return a row for each backbone, number of images and executor; ratios are taken within a repeat."""
    wall_s: dict[tuple[str, int], dict[str, list[float]]] = {}
    used: dict[tuple[str, int, str], set[str]] = {}
    for one in results:
        case = (one["backbone"], one["images"])
        wall_s.setdefault(case, {}).setdefault(one["executor"], []).append(one["wall_s"])
        used.setdefault((*case, one["executor"]), set()).add(one["used"])
    rows = []
    for (backbone, images), times in wall_s.items():
        named = [values for name, values in times.items() if name != "auto"]
        best = min(named, key=lambda values: Spread.of(values).median) if named else times["auto"]
        for name, values in times.items():
            rates = Spread.of([images / seconds for seconds in values]).text()
            ratios = Spread.of([a / b for a, b in zip(values, best, strict=True)]).text(2)
            more_s = Spread.of([a - b for a, b in zip(values, best, strict=True)]).text()
            chosen = "/".join(sorted(used[backbone, images, name]))
            rows.append([backbone, images, name, chosen, Spread.of(values).text(), rates, ratios, more_s])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "lite0"])
    parser.add_argument("--images", nargs="+", type=one_or_more, default=[100, 700, 3000])
    parser.add_argument("--set", choices=SETS, default="photos")
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=["auto", "eager", "openvino", "compile"])
    parser.add_argument("--memory", choices=("fresh", "kept"), default="kept")
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--results", type=Path, default=HERE / ".executors.jsonl")
    options = parser.parse_args()
    rows = rows_of(measure(options))
    print_table(
        f"Executors, random weights, records {options.memory}, {options.repeats} repeats, vectors: {' '.join(vector_flags())}",
        ("backbone", "images", "executor", "used", "wall s", "images/s", "x best", "s more than best"),
        rows,
        f"target of auto: at most {MOST_RATIO} x the best where records are kept, else {MOST_S:g} s more",
        "wall: the whole process, from start to end; best: the smallest median of the named executors",
    )


if __name__ == "__main__":
    main()

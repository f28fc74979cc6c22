"""How much memory does a head take on features that are four times as large as --max-memory, and is it the same head?

Random features in a real cache, read in chunks and at once; each way is a whole `fit-head`, scores and run included, at one l2,
in a process of its own. Memory: the most that the process itself held (pages of the mapped file can be dropped at any time),
looked at every 10 ms, less what it held with its libraries imported and the list of images read.

python benchmarks/out_of_core.py --rows 250000 --width 2048
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import answered, print_table, run_way, say

from embedpipe.heads import LinearHead

CLASSES, L2, SOLVERS = 5, 1e-3, ("newton", "ridge")
SPEC = {"source": "random", "architecture": "normal", "layer": "penultimate", "view": 0}


def write_cache(folder: Path, rows: int, width: int) -> None:
    """Write features of `rows` images that do not exist, in one space, and their sample table."""
    from embedpipe.cache import Cache
    from embedpipe.data import Manifest, Sample
    from embedpipe.data._source import Source

    random, cache = np.random.default_rng(0), Cache(folder)
    keys = [hashlib.sha256(str(row).encode()).digest() for row in range(rows)]
    y = random.integers(CLASSES, size=rows)
    middles = 0.1 * random.normal(size=(CLASSES, width))
    space = cache.open_space(SPEC)
    with space.writer(feature_dim=width, dtype="float32", environment={}, pins={}) as writer:
        for first in range(0, rows, 1024):
            some = slice(first, min(first + 1024, rows))
            features = middles[y[some]] + random.normal(size=(some.stop - first, width))
            writer.append(keys[some], features.astype(np.float32))
        writer.finish()
    samples = [Sample(f"{k}", str(label), "train", None, keys[k]) for k, label in enumerate(y.tolist())]
    classes = tuple(str(c) for c in range(CLASSES))
    manifest = Manifest("random", (Source("random", folder),), tuple(samples), classes, 0, (), ())
    cache.set_latest(cache.write_dataset(manifest), [space.folder.name])


def fit(cache: str, solver: str, max_bytes: float, runs: str) -> dict[str, Any]:
    """Run `fit-head` at one l2; tell what it took beside the imported libraries and the list of images."""
    import safetensors.numpy  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch  # noqa: F401

    import embedpipe as ep
    from embedpipe.cache import Cache
    from embedpipe.features import open_features

    bare = _held()
    features = open_features(Cache(Path(cache)))
    features.samples("train")
    before, start = _held(), time.monotonic()
    peak, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], _held())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    ep.fit_head(features, solver=solver, l2=L2, max_memory=f"{int(max_bytes)}B", runs_dir=runs)
    ended.set()
    thread.join()
    return {"peak_bytes": peak[0] - before, "list_bytes": before - bare, "seconds": time.monotonic() - start}


def _held() -> int:
    """Return the bytes of anonymous memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    whole = options.rows * options.width * 4
    limit, table = whole / 4, []
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name) / "cache", options.rows, options.width)
        for solver in SOLVERS:
            weights: list[Any] = []
            for way, most in (("in chunks", limit), ("at once", 10 * whole)):
                runs = Path(name) / f"{solver} {way}"
                found = run_way(__file__, "fit", cache=f"{name}/cache", solver=solver, max_bytes=most, runs=str(runs))
                weights.append(LinearHead.load(next(runs.iterdir())).weight)
                away = np.abs(weights[-1] - weights[0]).max() / np.abs(weights[-1]).max()
                share = f"{found['peak_bytes'] / limit:.2f}"
                peak = f"{found['peak_bytes'] / 1e6:,.0f}"
                table.append([solver, way, peak, share, f"{found['seconds']:.1f}", f"{away:.0e}"])
                say(f"{table[-1]}, the list of images {found['list_bytes'] / 1e6:,.0f} MB")
    print_table(
        f"fit-head on {options.rows:,} x {options.width} float32 ({whole / 1e6:,.0f} MB), --max-memory {limit / 1e6:,.0f}MB",
        ["solver", "features", "peak MB", "of --max-memory", "s", "largest difference of a weight, of the largest"],
        table,
        f"beside the libraries and the list of images, {found['list_bytes'] / 1e6:,.0f} MB",
    )


WAYS = {"fit": fit}

if __name__ == "__main__" and not answered(WAYS):
    main()

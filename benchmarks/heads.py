"""What does a head cost whose l2 is selected, beside one fit of scikit-learn?

Simulated features with the spectrum of real ones, float32, a tenth as many rows for val and for test. CPU seconds of a process.

python benchmarks/heads.py --repeats 3
python benchmarks/heads.py --shapes 50000,512,10 --threads 2
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import CHILD, Spread, answered, interleave, one_or_more, print_table, run_way

SHAPES = {"50000,512,10": 0.6, "20000,2048,100": 3.5, "20000,512,1000": 4.0}  # N, D, C and the ratio that is aimed at
WHOLE = 1.5  # of fit-head to the selection and fit alone
ITERATIONS, ONE_L2 = 10_000, 1e-3  # of scikit-learn, which stops at its own tolerance
PLACES = (0, 1, 3, 10, 30, 100, 200, 300, 400, 511)  # in the spectrum, and the eigenvalues there
EIGENVALUES = (44.9, 41.0, 16.9, 7.88, 3.30, 0.934, 0.36, 0.153, 0.062, 0.003)
APART = 2.6  # distance of classes: at N = 50,000, D = 512, C = 10 the best head gets 82 % of new rows right
SPEC = {"source": "random", "architecture": "normal", "layer": "penultimate", "view": 0}
Split = tuple[np.ndarray, np.ndarray]


def make_splits(n: int, width: int, n_classes: int) -> dict[str, Split]:
    """Return features float32 (n, width) and labels int64 (n,) of train, val and test.

    Their covariance has the eigenvalues that 512 of the lite0 features of 2,624 photographs (elpv) have, standardised; the
    classes differ along all of it, and overlap so that no head gets all rows right.
    """
    random, total = np.random.default_rng(0), n + 2 * (n // 10)
    spectrum = np.exp(np.interp(np.linspace(0, 511, width), PLACES, np.log(EIGENVALUES)))
    turned, _ = np.linalg.qr(random.normal(size=(width, width)))
    y = random.integers(n_classes, size=total)
    middles = APART / np.sqrt(width) * random.normal(size=(n_classes, width))
    X = (middles[y] + random.normal(size=(total, width))) * np.sqrt(spectrum) @ turned
    X = ((X - X.mean(axis=0)) / X.std(axis=0)).astype(np.float32)
    cuts = (0, n, n + n // 10, total)
    return {
        split: (X[first:last].copy(), y[first:last])
        for split, first, last in zip(("train", "val", "test"), cuts, cuts[1:], strict=False)
    }


def write_cache(folder: Path, shape: tuple[int, int, int]) -> None:
    """Write the features of images that do not exist into one space, and their sample table."""
    from embedpipe.cache import Cache
    from embedpipe.data import Manifest, Sample
    from embedpipe.data._source import Source

    cache = Cache(folder)
    space = cache.open_space(SPEC)
    samples = []
    with space.writer(feature_dim=shape[1], dtype="float32", environment={}, pins={}) as writer:
        for split, (X, y) in make_splits(*shape).items():
            keys = [hashlib.sha256(f"{split} {row}".encode()).digest() for row in range(len(y))]
            for first in range(0, len(y), 1024):
                writer.append(keys[first : first + 1024], X[first : first + 1024])
            samples += [Sample(f"{split}{k}", str(c), split, None, keys[k]) for k, c in enumerate(y.tolist())]
        writer.finish()
    classes = tuple(str(c) for c in range(shape[2]))
    manifest = Manifest("random", (Source("random", folder),), tuple(samples), classes, 0, (), ())
    cache.set_latest(cache.write_dataset(manifest), [space.folder.name])


def select_and_fit(shape: list[int], l2: float | str, standardize: bool = True) -> dict[str, Any]:
    import torch  # noqa: F401

    from embedpipe.heads import fit_path

    splits = make_splits(*shape)
    classes = [str(c) for c in range(shape[2])]
    start = time.process_time()
    rows = *splits["train"], *splits["val"]
    path = fit_path(*rows, classes=classes, l2=l2, standardize=standardize)  # type: ignore[arg-type]
    cpu_s = time.process_time() - start
    return {"cpu_s": cpu_s, "objective": path.head.provenance["objective"], "l2": path.l2, "tried": len(path.points)}


def scikit_learn(shape: list[int]) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    from embedpipe.heads._problem import Problem

    X, y = make_splits(*shape)["train"]
    model = LogisticRegression(C=1 / (len(y) * ONE_L2), max_iter=ITERATIONS)
    start = time.process_time()
    model.fit(X, y)
    cpu_s = time.process_time() - start
    problem = Problem(X, y, np.full(len(y), 1 / len(y)), shape[2])
    return {"cpu_s": cpu_s, "objective": problem.objective(model.coef_, model.intercept_, ONE_L2)}


def whole(cache: str, runs: str) -> dict[str, Any]:
    import scipy.optimize  # noqa: F401
    import torch  # noqa: F401

    import embedpipe as ep

    start = time.process_time()
    ep.fit_head(cache_dir=cache, runs_dir=runs)
    return {"cpu_s": time.process_time() - start}


WAYS = {"select": select_and_fit, "scikit-learn": scikit_learn, "fit-head": whole}


def compare(text: str, repeats: int) -> list[object]:
    """Return the row of a shape."""
    n, width, n_classes = map(int, text.split(","))
    shape = [n, width, n_classes]
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name) / "cache", (n, width, n_classes))
        found = interleave(
            {
                "select": lambda: run_way(__file__, "select", shape=shape, l2="auto"),
                "scikit-learn": lambda: run_way(__file__, "scikit-learn", shape=shape),
                "one": lambda: run_way(__file__, "select", shape=shape, l2=ONE_L2, standardize=False),
                "fit-head": lambda: run_way(__file__, "fit-head", cache=f"{name}/cache", runs=f"{name}/runs"),
            },
            repeats,
        )
    seconds = {way: [run["cpu_s"] for run in runs] for way, runs in found.items()}

    def ratio(way: str, other: str) -> str:
        pairs = zip(seconds[way], seconds[other], strict=True)
        return Spread.of([one / reference for one, reference in pairs]).text(2)

    gap = found["scikit-learn"][0]["objective"] / found["one"][0]["objective"] - 1
    times = [Spread.of(seconds[way]).text() for way in ("select", "scikit-learn", "one", "fit-head")]
    tried = f"{found['select'][0]['tried']}, {found['select'][0]['l2']:.1g}"
    ratios = ratio("select", "scikit-learn"), SHAPES.get(text, ""), ratio("fit-head", "select")
    return [f"{n:,} x {width}, {n_classes}", *times[:2], *ratios, f"{gap:.0e}", tried, *times[2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="N,D,C")
    parser.add_argument("--repeats", type=one_or_more, default=1)
    parser.add_argument("--threads", type=one_or_more, default=1)
    options = parser.parse_args()
    os.environ["EMBEDPIPE_BENCH_THREADS"] = str(options.threads)
    header = ("N x D, classes", "l2 auto, s", "scikit-learn, one l2, s", "ratio", "aimed at")
    header = (*header, f"fit-head over l2 auto ({WHOLE} aimed at)", "gap of scikit-learn")
    header = (*header, "l2 tried, selected", "one l2, s", "fit-head, s")
    rows = [compare(shape, options.repeats) for shape in options.shapes]
    print_table(
        f"CPU seconds of heads, {options.repeats} repeats, {options.threads} thread(s)",
        header,
        rows,
        f"one l2: {ONE_L2}; gap: objective there above ours, relative to it; ours is at most 4e-7 above the minimum",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = os.environ.get("EMBEDPIPE_BENCH_THREADS", "1")
        import threadpoolctl

        threadpoolctl.threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))  # NumPy has been imported
    if not answered(WAYS):
        main()

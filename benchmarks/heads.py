"""What does the whole path over l2 cost, beside scikit-learn's fits?

Simulated features with the spectrum of real ones, float32, standardised. One thread for all; CPU seconds.

python benchmarks/heads.py --shape 50000 512 10 --repeats 1
python benchmarks/heads.py --shape 20000 512 10 --repeats 3 --folds 5    # ridge: what do folds save that share one Gram?
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402
from measuring import Spread, answered, interleave, one_or_more, print_table, run_way  # noqa: E402

COLD = 6  # of the l2, evenly spread, that are fitted from nothing; the rest are interpolated
ITERATIONS, TOLERANCE = 10_000, 1e-4  # of scikit-learn; the latter is its own
PLACES = (0, 1, 3, 10, 30, 100, 200, 300, 400, 511)  # in the spectrum, and the eigenvalues there
EIGENVALUES = (44.9, 41.0, 16.9, 7.88, 3.30, 0.934, 0.36, 0.153, 0.062, 0.003)
APART = 2.6  # how far: at N = 50,000, D = 512, C = 10 the best head gets 82 % of new rows right
ONE_L2 = 1e-3


def features(n: int, width: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features float32 (n, width), standardised, and labels int64 (n,).

    Their covariance has the eigenvalues that 512 of the lite0 features of 2,624 photographs (elpv) have, standardised; the
    classes differ along all of it, and overlap so that no head gets all rows right.
    """
    random = np.random.default_rng(0)
    spectrum = np.exp(np.interp(np.linspace(0, 511, width), PLACES, np.log(EIGENVALUES)))
    turned, _ = np.linalg.qr(random.normal(size=(width, width)))
    y = random.integers(n_classes, size=n)
    middles = APART / np.sqrt(width) * random.normal(size=(n_classes, width))
    X = (middles[y] + random.normal(size=(n, width))) * np.sqrt(spectrum) @ turned
    return ((X - X.mean(axis=0)) / X.std(axis=0)).astype(np.float32), y


def l2_grid() -> list[float]:
    from embedpipe.heads import L2_GRID

    return sorted(L2_GRID, reverse=True)


def ours(shape: Sequence[int], l2s: Sequence[float]) -> dict[str, Any]:
    import torch

    from embedpipe.heads._batched_objective import BatchedObjective, has_native_bfloat16
    from embedpipe.heads._newton import solve_path
    from embedpipe.heads._problem import Problem

    class Counted(BatchedObjective):
        """Counts evaluations and Hessian-vector products, by the rows of weights that they carry."""

        def evaluate(self, l2: Any, W: Any, b: Any) -> Any:
            counts["evaluate", W.shape[0] * W.shape[1]] += 1
            return super().evaluate(l2, W, b)

        def hessian_product(self, at: Any, V: Any, c: Any, **options: Any) -> Any:
            counts["hessian", V.shape[0] * V.shape[1]] += 1
            return super().hessian_product(at, V, c, **options)

    torch.set_num_threads(1)
    X, y = features(*shape)
    problem = Problem(X, y, np.full(len(y), 1 / len(y)), shape[2])
    counts: Counter[tuple[str, int]] = Counter()
    start = time.process_time()
    objective = Counted(problem, bfloat16=len(l2s) > 1 and has_native_bfloat16())
    weights, biases, _ = solve_path(objective, l2s)
    cpu_s = time.process_time() - start
    objectives = [problem.objective(*each) for each in zip(weights, biases, l2s, strict=True)]
    return {
        "cpu_s": cpu_s,
        "l2": list(l2s),
        "objectives": objectives,
        **_bounds(X, counts, bfloat16=objective.bfloat16),
    }


def _bounds(X: np.ndarray, counts: Counter[tuple[str, int]], *, bfloat16: bool) -> dict[str, float]:
    """Return the seconds of the matrix products alone: in whole, and as if all were float32 and of the widest shape."""
    import torch

    x = torch.from_numpy(X)
    features = {"evaluate": x, "hessian": x.bfloat16() if bfloat16 else x}
    widest = max(rows for _, rows in counts)
    own = sum(times * _product_s(features[kind], rows) for (kind, rows), times in counts.items())
    evaluations = sum(times * rows for (_, rows), times in counts.items()) / widest
    return {"own_s": own, "batched_s": evaluations * _product_s(x, widest)}


def _product_s(x: Any, rows: int) -> float:
    """Return the seconds of W X' and then (W X') X, in blocks of rows."""
    import torch

    weight = torch.randn(rows, x.shape[1]).to(x.dtype)
    size = min(max(2**18 // rows // 64 * 64, 256), 1024 if x.dtype == torch.float32 else 4096)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        for first in range(0, len(x), size):
            block = x[first : first + size]
            (weight @ block.T) @ block
        best = min(best, time.process_time() - start)
    return float(best)


def scikit_learn(
    shape: Sequence[int], l2s: Sequence[float], warm: bool, tol: float = TOLERANCE, patched: bool = False
) -> dict[str, Any]:
    if patched:
        from sklearnex import patch_sklearn

        patch_sklearn(verbose=False)
    from sklearn.linear_model import LogisticRegression

    from embedpipe.heads._problem import Problem

    X, y = features(*shape)
    problem = Problem(X, y, np.full(len(y), 1 / len(y)), shape[2])
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=warm, tol=tol)
    seconds, objectives = [], []
    for l2 in l2s:
        start = time.process_time()
        model.set_params(C=1 / (len(y) * l2)).fit(X, y)
        seconds.append(time.process_time() - start)
        objectives.append(problem.objective(model.coef_, model.intercept_, l2))
    return {"cpu_s": sum(seconds), "each_s": seconds, "l2": list(l2s), "objectives": objectives}


def folds(shape: Sequence[int], count: int, shared: bool) -> dict[str, Any]:
    """Cross-validate `ridge`, with one Gram for all folds or a new one for each fit."""
    from embedpipe.selection import HeadConfig, cross_fit

    class Alone(HeadConfig):
        def gram(self, *_: Any, **__: Any) -> None:
            return None

    X, y = features(*shape)
    config = (HeadConfig if shared else Alone)(tuple(map(str, range(shape[2]))), solver="ridge")
    start = time.process_time()
    cross_fit(X, y, range(len(y)), config, folds=count, seed=0)
    return {"cpu_s": time.process_time() - start}


WAYS = {"ours": ours, "scikit-learn": scikit_learn, "folds": folds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=one_or_more, nargs=3, default=(50_000, 512, 10), metavar=("N", "D", "C"))
    parser.add_argument("--repeats", type=one_or_more, default=1)
    parser.add_argument("--intelex", action="store_true", help="scikit-learn-intelex too, which has no warm start")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="the ways that have one of these words in their names"
    )
    parser.add_argument("--cold", type=one_or_more, default=COLD, help="how many of the 45 are fitted from nothing")
    parser.add_argument("--folds", type=int, help="cross-validate with so many folds, nothing else")
    parser.add_argument(
        "--tol", type=float, default=TOLERANCE, help="where scikit-learn stops; at its own, far off for small l2"
    )
    options = parser.parse_args()
    if options.shape[2] < 2:
        parser.error(f"--shape has C = {options.shape[2]}, expected two classes or more")
    if options.folds is not None and options.folds < 2:
        parser.error(f"--folds is {options.folds}, expected 2 or more")
    if options.folds:
        return compare_folds(options)
    grid = l2_grid()
    some = [grid[round(k)] for k in np.linspace(0, len(grid) - 1, options.cold)]

    def way(name: str, l2s: Sequence[float], **more: Any) -> Callable[[], dict[str, Any]]:
        return lambda: run_way(__file__, name, shape=list(options.shape), l2s=list(l2s), **more)

    ways = {
        "embedpipe, path": way("ours", grid),
        "embedpipe, one fit": way("ours", [ONE_L2]),
        "scikit-learn, one fit": way("scikit-learn", [ONE_L2], warm=False, tol=options.tol),
        "scikit-learn, each from nothing": way("scikit-learn", some, warm=False, tol=options.tol),
        "scikit-learn, each from the last": way("scikit-learn", grid, warm=True, tol=options.tol),
    }
    if options.intelex:
        ways["scikit-learn-intelex, each from nothing"] = way("scikit-learn", some, warm=False, patched=True)
    if options.only:
        ways = {name: run for name, run in ways.items() if any(word in name for word in options.only)}
    if lacking := {_reference(name) for name in ways or ["embedpipe, path"]} - {*ways}:
        parser.error(f"--only {' '.join(options.only)} leaves out {', '.join(lacking)}, which others are held against")
    if not options.tol > 0:
        parser.error(f"--tol is {options.tol:g}, expected more than 0")
    found = interleave(ways, options.repeats)
    n, width, n_classes = options.shape
    print_table(
        f"45 values of l2, N = {n}, D = {width}, C = {n_classes}, {options.repeats} repeats, one thread, tol {options.tol:g}",
        (
            "way",
            "fits run",
            "CPU s",
            "CPU s for all",
            "x ours",
            "objective above ours at most",
            "our optimum over theirs",
        ),
        [_row(name, runs, found) for name, runs in found.items()],
        "CPU s for all: of fits from nothing some are run, and the others interpolated between them",
        f"one fit: l2 = {ONE_L2:g}, its ratio to our one fit",
        "last columns: the largest relative difference of an objective from ours at the same l2, and of ours from theirs",
        "tol: of scikit-learn",
    )
    path = found.get("embedpipe, path")
    if not path:
        return
    print_table(
        "The path and its kernels",
        (
            "path, CPU s",
            "its matrix products alone",
            "ratio",
            "evaluations x a float32 product of the widest shape",
            "ratio",
        ),
        [_kernels(path)],
    )


def compare_folds(options: argparse.Namespace) -> None:
    def way(shared: bool) -> Callable[[], dict[str, Any]]:
        return lambda: run_way(__file__, "folds", shape=list(options.shape), count=options.folds, shared=shared)

    found = interleave({"one for all": way(True), "a new one for each fit": way(False)}, options.repeats)
    n, width, n_classes = options.shape
    print_table(
        f"{options.folds} folds by ridge, N = {n}, D = {width}, C = {n_classes}, {options.repeats} repeats, one thread",
        ("Gram", "CPU s"),
        [(name, Spread.of([run["cpu_s"] for run in runs]).text(2)) for name, runs in found.items()],
    )


def _row(name: str, runs: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> list[object]:
    one, reference = "one fit" in name, found[_reference(name)]
    total = [run["cpu_s"] if one else _for_all(run) for run in runs]
    ratio = [theirs / base["cpu_s"] for theirs, base in zip(total, reference, strict=True)]
    above, below = [], []
    for run, base in zip(runs, reference, strict=True):
        best = dict(zip(base["l2"], base["objectives"], strict=True))
        gaps = [value / best[l2] - 1 for l2, value in zip(run["l2"], run["objectives"], strict=True)]
        above.append(max(gaps))
        below.append(max(0.0, -min(gaps)))
    seconds = Spread.of([run["cpu_s"] for run in runs]).text()
    shown = [f"{max(above):.1e}", f"{max(below):.1e}"]
    return [name, len(runs[0]["l2"]), seconds, Spread.of(total).text(), Spread.of(ratio).text(), *shown]


def _reference(name: str) -> str:
    return "embedpipe, one fit" if "one fit" in name else "embedpipe, path"


def _for_all(run: dict[str, Any]) -> float:
    """Return the seconds of all 45, from those of some by linear interpolation."""
    if len(run["l2"]) == len(l2_grid()):
        return float(run["cpu_s"])
    places = [l2_grid().index(l2) for l2 in run["l2"]]
    return float(np.interp(range(len(l2_grid())), places, run["each_s"]).sum())


def _kernels(path: list[dict[str, Any]]) -> list[object]:
    own, batched = ([run[key] for run in path] for key in ("own_s", "batched_s"))
    ratios = [[run["cpu_s"] / run[key] for run in path] for key in ("own_s", "batched_s")]
    texts = [Spread.of(values).text(2) for values in ratios]
    seconds = [Spread.of(values).text() for values in ([run["cpu_s"] for run in path], own, batched)]
    return [seconds[0], seconds[1], texts[0], seconds[2], texts[1]]


if __name__ == "__main__" and not answered(WAYS):
    main()

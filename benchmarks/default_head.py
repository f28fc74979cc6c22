"""How good are the probabilities of the default head, beside the former rule and the best l2 of the grid?

    python benchmarks/default_head.py --data FOLDER

Nine sets, two backbones (the last layer), 10 or 30 training images a class or all, val a quarter of them, some random splits
(`sets.py`). Before: l2 by the accuracy on val. Best: the lowest log loss on test of all 45 l2, which no rule can know.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from measuring import print_table
from sets import DEVELOPED, FOLDER, add_options, commits, interval, measure_cells, open_set, split_anew, with_samples

from embedpipe.evaluation import losses
from embedpipe.heads import fit_path
from embedpipe.selection import HeadConfig

MOST = {"aerial": 28, "greek": 10, "stylised": 22}  # training images a class; more would be all of them
SHOTS, WAYS = (10, 30, None), ("before", "now")


def measure(name: str, backbone: str, shots: int | None, seed: int) -> dict[str, Any]:
    features = open_set(name, backbone, OPTIONS.data)
    features = with_samples(features, split_anew(name, features.manifest.samples, seed, shots))
    config = HeadConfig(features.classes, widths=features.widths)
    X, y = features.arrays("test")
    sizes = {f"n_{split}": len(features.arrays(split)[1]) for split in ("train", "val", "test")}
    found: dict[str, Any] = {}
    for way, one in (("before", replace(config, selection="accuracy")), ("now", config)):
        path = one.select_on(features)
        probabilities = path.head.predict_proba(X)
        accuracy = float((probabilities.argmax(axis=1) == y).mean())
        found[way] = {"loss": float(losses(probabilities, y).mean()), "accuracy": accuracy, "l2": path.l2}
        found[way]["on"] = path.selected_on
    points = fit_path(*features.arrays("train"), X, y, classes=features.classes, select="accuracy").points
    best = min(points, key=lambda point: point["val_log_loss"])
    return {**sizes, **found, "best": {"loss": best["val_log_loss"], "l2": best["l2"]}}


def summarise(lines: Sequence[dict[str, Any]]) -> None:
    cells = defaultdict(list)
    for line in lines:
        cells[line["name"], line["backbone"], line["shots"]].append(line)
    rows, judged = [], []
    for (name, backbone, shots), runs in cells.items():
        cell = judge(runs)
        judged.append({"name": name, **cell})
        means = [f"{statistics.mean(run[way]['loss'] for run in runs):.3f}" for way in ("before", "now", "best")]
        difference = f"{cell['points']:+.1f} (se {cell['se']:.1f})"
        l2s = [
            f"{min(run[way]['l2'] for run in runs):.0e} to {max(run[way]['l2'] for run in runs):.0e}" for way in WAYS
        ]
        rule = "/".join(sorted({run["now"]["on"] for run in runs}))
        sizes = f"{runs[0]['n_train']} / {runs[0]['n_val']}"
        ratios = [f"{cell[key]:.2f}" for key in ("ratio", "to_best")]
        rows.append((name, backbone, shots or "all", sizes, rule, *means, *ratios, difference, *l2s))
    header = ("set", "backbone", "a class", "train / val", "selected on", "before", "now", "best of the grid")
    header += ("now / before", "now / best", "accuracy, points", "l2 before", "l2 now")
    print_table(f"Log loss on test, mean of {len(runs)} splits", header, rows, commits(lines))
    parts = {"all": judged, "developed on": [one for one in judged if one["name"] in DEVELOPED]}
    parts["only reported"] = [one for one in judged if one["name"] not in DEVELOPED]
    verdicts = [(part, len(those), *verdict(those)) for part, those in parts.items() if those]
    header = ("sets", "cells", "loss not higher by more than 1 %", "at most 1.15x the best, or within .01")
    header += (
        "mean ratio of losses (95 %)",
        "mean difference of losses (95 %)",
        "accuracy lower beyond 1 point + 2 se",
    )
    print_table("Verdict", header, verdicts)


def judge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    before, now, best = ([run[way]["loss"] for run in runs] for way in ("before", "now", "best"))
    points = [100 * (run["now"]["accuracy"] - run["before"]["accuracy"]) for run in runs]
    mean_before, mean_now, mean_best = map(statistics.mean, (before, now, best))
    return {
        "ratio": mean_now / mean_before,
        "difference": mean_now - mean_before,
        "to_best": mean_now / mean_best,
        "near": mean_now <= 1.15 * mean_best or mean_now - mean_best <= 0.01,
        "points": statistics.mean(points),
        "se": statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else 0.0,
    }


def verdict(cells: Sequence[dict[str, Any]]) -> list[str]:
    n = len(cells)
    not_higher, near = sum(one["ratio"] <= 1.01 for one in cells), sum(one["near"] for one in cells)
    worse = sum(one["points"] < -1 - 2 * one["se"] for one in cells)
    ratio = [math.exp(value) for value in interval([math.log(one["ratio"]) for one in cells])]
    difference = interval([one["difference"] for one in cells])
    texts = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (ratio, difference)]
    return [f"{not_higher} ({not_higher / n:.0%})", f"{near} ({near / n:.0%})", *texts, f"{worse}"]


def main() -> None:
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--splits", type=int, default=5)
    OPTIONS = parser.parse_args()
    cells = [
        {"name": name, "backbone": backbone, "shots": shots, "seed": seed}
        for backbone in OPTIONS.backbones
        for name in OPTIONS.sets
        for shots in SHOTS
        if shots is None or shots < MOST.get(name, 1000)
        for seed in range(OPTIONS.splits)
    ]
    summarise(measure_cells(FOLDER / "default_head.jsonl", cells, measure))


if __name__ == "__main__":
    main()

"""What do cached views of the training images bring where these are few?

    python benchmarks/views.py --data FOLDER

10 training images a class, val a quarter of them, four views of each training image; a whole `fit-head` with `--views off` and
with the default, which uses views where they lower the log loss on val.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from measuring import print_table
from sets import BACKBONES, DEVELOPED, FOLDER, add_options, commits, interval, measure_cells, open_set, split_anew

import embedpipe as ep

SHOTS, VIEWS, SMALL = 10, 4, 0.1


def measure(name: str, backbone: str, augment: str, seed: int) -> dict[str, Any]:
    manifest = open_set(name, backbone, OPTIONS.data).manifest
    table = FOLDER / f"{name}-{seed}.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "group"])
        for one in split_anew(name, manifest.samples, seed, SHOTS):
            writer.writerow([f"{name}/{one.path}", one.label, one.split, one.group or ""])
    extracting = {"weights": "packaged", "cache_dir": str(FOLDER / "cache"), "views": VIEWS, "augment": augment}
    features = ep.extract(str(table), **BACKBONES[backbone], **extracting)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as runs:
        for views in ("off", "auto"):
            report = ep.fit_head(features, views=views, runs_dir=runs).report  # type: ignore[arg-type]
            test = report["metrics"]["test"]
            found[views] = {"loss": test["log_loss"], "accuracy": test["accuracy"]}
    return {**found, "used": report["views"]["used"], "n_train": report["n_train"]}


def summarise(lines: Sequence[dict[str, Any]]) -> None:
    cells = defaultdict(list)
    for line in lines:
        cells[line["name"], line["backbone"], line["augment"]].append(line)
    rows, judged = [], []
    for (name, backbone, augment), runs in cells.items():
        off, auto = (statistics.mean(run[way]["loss"] for run in runs) for way in ("off", "auto"))
        points = 100 * statistics.mean(run["auto"]["accuracy"] - run["off"]["accuracy"] for run in runs)
        judged.append({"name": name, "off": off, "auto": auto, "points": points})
        each = " ".join(f"{run['auto']['loss'] / run['off']['loss']:.2f}" for run in runs)
        used = f"{sum(run['used'] for run in runs)} of {len(runs)}"
        rows.append(
            (name, backbone, augment, f"{off:.3f}", f"{auto:.3f}", f"{auto / off:.3f}", each, used, f"{points:+.1f}")
        )
    header = (
        "set",
        "backbone",
        "augmentation",
        "without",
        "by default",
        "ratio",
        "each",
        "views used",
        "accuracy, points",
    )
    title = f"Log loss on test, {SHOTS} a class, {VIEWS} views, mean of {len(runs)} splits"
    print_table(title, header, rows, commits(lines))
    verdicts = []
    for part, those in (
        ("all", judged),
        ("developed on", [one for one in judged if one["name"] in DEVELOPED]),
        ("only reported", [one for one in judged if one["name"] not in DEVELOPED]),
    ):
        if those:
            ratio = [math.exp(value) for value in interval([math.log(one["auto"] / one["off"]) for one in those])]
            difference = interval([one["auto"] - one["off"] for one in those])
            points = interval([one["points"] for one in those])
            texts = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (ratio, difference, points)]
            worse = sum(one["auto"] > 1.05 * one["off"] and one["off"] > SMALL for one in those)
            verdicts.append((part, len(those), *texts, worse))
    header = ("sets", "cells", "ratio of losses (95 %)", "difference of losses (95 %)", "accuracy, points (95 %)")
    print_table("Verdict", (*header, f"more than 5 % worse where the loss is above {SMALL}"), verdicts)


def main() -> None:
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--augment", nargs="+", default=["standard"])
    OPTIONS = parser.parse_args()
    cells = [
        {"name": name, "backbone": backbone, "augment": augment, "seed": seed}
        for backbone in OPTIONS.backbones
        for name in OPTIONS.sets
        for augment in OPTIONS.augment
        for seed in range(OPTIONS.splits)
    ]
    summarise(measure_cells(FOLDER / "views.jsonl", cells, measure))


if __name__ == "__main__":
    main()

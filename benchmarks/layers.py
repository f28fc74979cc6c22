"""Does a head on several layers earn its place beside one on the last layer alone?

    embedpipe extract data/ --backbone timm:tf_efficientnet_lite0 --weights packaged --layer penultimate --layer all
    python benchmarks/layers.py data/ --layer blocks.4 --layer blocks.5 --layer penultimate

Each repeat splits all samples anew into train, val and test, stratified by class, groups and copies not kept together. `fit-head`
chooses on val between the last layer and several; test is looked at once for each way.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from measuring import print_table, say

import embedpipe as ep
from embedpipe.cache import Cache
from embedpipe.data import Sample
from embedpipe.features import open_features

T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by number of splits


@dataclass(frozen=True)
class Repeat:
    """Test accuracy of the last layer and of what val chose, and the layers of that."""

    last: float
    chosen: float
    layers: str


def split_anew(samples: tuple[Sample, ...], seed: int, *, val: float, test: float, least: int) -> tuple[Sample, ...]:
    """Return the labelled samples with splits of these shares of each class; classes with fewer than `least` images go."""
    rng = np.random.default_rng(seed)
    counts = Counter(sample.label for sample in samples if sample.label is not None)
    dealt: list[Sample] = []
    for label in sorted(name for name, count in counts.items() if count >= least):
        mine = [sample for sample in samples if sample.label == label]
        ends = round(val * len(mine)), round(val * len(mine)) + round(test * len(mine))
        for place, k in enumerate(rng.permutation(len(mine)).tolist()):
            split = "val" if place < ends[0] else "test" if place < ends[1] else "train"
            dealt.append(replace(mine[k], split=split))
    return tuple(dealt)


def repeat(features: ep.FeatureSet, seed: int, options: argparse.Namespace) -> Repeat:
    shares = {"val": options.val, "test": options.test, "least": options.least}
    samples = split_anew(features.manifest.samples, seed, **shares)
    classes = tuple(sorted({sample.label or "" for sample in samples}))
    features = replace(features, manifest=replace(features.manifest, samples=samples, classes=classes))
    last = features.only([features.spaces[-1]])
    with tempfile.TemporaryDirectory() as runs:
        alone, chosen = (ep.fit_head(one, solver=options.solver, runs_dir=runs) for one in (last, features))
    layers = [block["layer"] for block in chosen.report["blocks"] if block["chosen"]]
    accuracies = (one.report["metrics"]["test"]["accuracy"] for one in (alone, chosen))
    say(f"split {seed}: {' + '.join(layers)}, {chosen.report['decision']}")
    return Repeat(*accuracies, layers=" + ".join(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="*", help="data sets in the cache; default: the latest")
    parser.add_argument("--layer", action="append", default=[], help="repeatable; default: all")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--val", type=float, default=300 / 1797)
    parser.add_argument("--test", type=float, default=397 / 1797)
    parser.add_argument("--least", type=int, default=10, help="images that a class must have")
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--cache-dir", default="cache")
    options = parser.parse_args()
    rows, cache = [], Cache(Path(options.cache_dir))
    for dataset in options.dataset or [None]:
        features = open_features(cache, dataset, layer=tuple(options.layer) or "all")
        found = [repeat(features, seed, options) for seed in range(options.splits)]
        last, chosen = ([getattr(one, way) for one in found] for way in ("last", "chosen"))
        gains = [100 * (one.chosen - one.last) for one in found]
        half = T_975[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
        mean = statistics.mean(gains)
        used = "; ".join(f"{count} x {layers}" for layers, count in Counter(one.layers for one in found).most_common())
        accuracies = [f"{100 * statistics.mean(way):.2f}" for way in (last, chosen)]
        each = " ".join(f"{gain:+.2f}" for gain in gains)
        rows.append(
            (features.manifest.name, *accuracies, f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})", each, used)
        )
    header = ("data set", "last layer, %", "what val chose, %", "gain, points (95 %)", "each split", "layers chosen")
    print_table(f"Accuracy on test, mean of {options.splits} random splits", header, rows)


if __name__ == "__main__":
    main()

"""Last layer, best single layer, several layers side by side, or a learned fusion of layers?

    python benchmarks/fusion.py --data FOLDER

The first three are what `fit-head` fits on `--layer penultimate`, by `--compare-layers` and on `--layer all`. The fusion is an
attentive pooling over layers: one learned query a head weighs the layers, and a linear classifier takes the pooled values; its
decay and its number of steps are chosen by the log loss on val. Source: arXiv 2601.09322.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from measuring import print_table
from sets import DEVELOPED, FOLDER, add_options, commits, interval, measure_cells, open_set, split_anew, with_samples
from torch import Tensor, nn

import embedpipe as ep
from embedpipe.evaluation import losses
from embedpipe.selection import Candidate, HeadConfig, select_blocks, select_space

WAYS = ("last layer", "best layer", "several layers", "fusion")
HEADS, WIDTH, STEPS, EVERY, RATE = 4, 64, 600, 20, 1e-3
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)


class Fusion(nn.Module):
    """Layers (n, L, D) to logits (n, C)."""

    def __init__(self, n_layers: int, width: int, n_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(HEADS, WIDTH))
        self.key, self.value = nn.Linear(width, WIDTH), nn.Linear(width, HEADS * WIDTH)
        self.place = nn.Parameter(torch.zeros(n_layers, WIDTH))
        self.classifier = nn.Linear(HEADS * WIDTH, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        share = ((self.key(x) + self.place) @ self.query.T / WIDTH**0.5).softmax(1)  # (n, L, heads)
        values = self.value(x).unflatten(2, (HEADS, WIDTH))
        return self.classifier((share[..., None] * values).sum(1).flatten(1))


def fuse(features: ep.FeatureSet) -> np.ndarray:
    """Return the probabilities (n, C) of test of the fusion that val chooses."""
    parts = {split: _stack(features, split) for split in ("train", "val", "test")}
    middle, spread = parts["train"][0].mean(0), parts["train"][0].std(0).clamp_min(1e-6)
    train, val, test = ((x - middle).div(spread) for x, _ in parts.values())
    y, y_val = parts["train"][1], parts["val"][1]
    best, chosen = np.inf, torch.zeros(0)
    for decay in DECAYS:
        torch.manual_seed(0)
        model = Fusion(*train.shape[1:], len(features.classes))
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=decay)
        for step in range(STEPS):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(train), y).backward()
            optimiser.step()
            if (step + 1) % EVERY == 0:
                with torch.no_grad():
                    loss = float(nn.functional.cross_entropy(model(val), y_val))
                    if loss < best:
                        best, chosen = loss, model(test).double().softmax(1)
    return chosen.numpy()


def _stack(features: ep.FeatureSet, split: str) -> tuple[Tensor, Tensor]:
    X, y = features.arrays(split)
    return torch.from_numpy(X).unflatten(1, (len(features.spaces), -1)), torch.from_numpy(y)


def measure(name: str, backbone: str, seed: int) -> dict[str, Any]:
    every = open_set(name, backbone, OPTIONS.data, layers="all")
    features = with_samples(every, split_anew(name, every.manifest.samples, seed, OPTIONS.shots))
    config = HeadConfig(features.classes)
    several, report = select_blocks(features, config)
    found = {
        "last layer": Candidate.fit(features.only(features.spaces[-1:]), config),
        "best layer": select_space(features, config)[0],
        "several layers": several,
    }
    y = features.arrays("test")[1]
    predicted = {way: one.path.head.predict_proba(one.features.arrays("test")[0]) for way, one in found.items()}
    if len({*features.widths}) == 1:
        predicted["fusion"] = fuse(features)
    scores = {
        way: {"loss": float(losses(p, y).mean()), "accuracy": float((p.argmax(axis=1) == y).mean())}
        for way, p in predicted.items()
    }
    layers = {way: list(one.features.layers) for way, one in found.items()}
    return {**scores, "layers": layers, "chosen": report["decision"]["chosen"]}


def summarise(lines: Sequence[dict[str, Any]]) -> None:
    cells = defaultdict(list)
    for line in lines:
        cells[line["backbone"], line["name"]].append(line)
    rows = []
    for (backbone, name), runs in cells.items():
        ways = [way for way in WAYS if way in runs[0]]
        texts = [f"{_mean(runs, way, 'accuracy'):.3f}, {_mean(runs, way, 'loss'):.3f}" for way in ways]
        chosen = ", ".join(f"{count} {what}" for what, count in Counter(run["chosen"] for run in runs).most_common())
        best = ", ".join(sorted({run["layers"]["best layer"][0] for run in runs}))
        rows.append((name, backbone, *texts, *[""] * (len(WAYS) - len(ways)), chosen, best))
    header = ("set", "backbone", *WAYS, "chosen of --layer all", "best layer")
    title = f"Accuracy and log loss on test, {OPTIONS.shots} a class, mean of {OPTIONS.splits} splits"
    print_table(title, header, rows, commits(lines))
    verdicts = []
    for backbone in sorted({backbone for backbone, _ in cells}):
        mine = {name: runs for (of, name), runs in cells.items() if of == backbone}
        for part in ("developed on", "only reported"):
            some = [runs for name, runs in mine.items() if (name in DEVELOPED) == (part == "developed on")]
            for way, other in (
                ("several layers", "last layer"),
                ("best layer", "last layer"),
                ("fusion", "several layers"),
            ):
                if some and way in some[0][0]:
                    verdicts.append((backbone, part, f"{way} over {other}", *_verdict(some, way, other)))
    header = (
        "backbone",
        "sets",
        "comparison",
        "accuracy, points (95 %)",
        "least",
        "difference of losses (95 %)",
        "most",
    )
    print_table("Verdict, over sets", header, verdicts)


def _verdict(cells: Sequence[Sequence[dict[str, Any]]], way: str, other: str) -> list[str]:
    points = [100 * (_mean(runs, way, "accuracy") - _mean(runs, other, "accuracy")) for runs in cells]
    loss = [_mean(runs, way, "loss") - _mean(runs, other, "loss") for runs in cells]
    texts = [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, low, high in map(interval, (points, loss))]
    return [texts[0], f"{min(points):+.2f}", texts[1], f"{max(loss):+.2f}"]


def _mean(runs: Sequence[dict[str, Any]], way: str, what: str) -> float:
    return statistics.mean(run[way][what] for run in runs)


def main() -> None:
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--shots", type=int, default=30, help="training images a class")
    OPTIONS = parser.parse_args()
    cells = [
        {"name": name, "backbone": backbone, "seed": seed}
        for backbone in OPTIONS.backbones
        for name in OPTIONS.sets
        for seed in range(OPTIONS.splits)
    ]
    summarise(measure_cells(FOLDER / "fusion.jsonl", cells, measure))


if __name__ == "__main__":
    main()

"""What does fine-tuning gain on real data with real weights, and what does it cost?

EfficientNet-Lite0 with its ImageNet weights on scikit-learn's digits (and elpv's solar cells), some seeds: the head, then layers
unfrozen from it. All choices on val; test is looked at once a run.

python benchmarks/accuracy.py layers --seeds 3          # head, blocks.6, blocks.5, all
python benchmarks/accuracy.py start --seeds 3           # from the head, and from a random one
python benchmarks/accuracy.py views --seeds 1           # four views kept, and as many changed anew
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import Spread, print_table, say
from photos import copy_cells

SPLITS = {"train": 1100, "val": 300, "test": 397}
BACKBONE: dict[str, Any] = {"backbone": "timm:tf_efficientnet_lite0", "weights": "packaged"}


def prepared(name: str) -> Any:
    """Write a data set into the current folder, extract it and fit its head."""
    import embedpipe as ep
    from embedpipe.commands.demo import write_digits

    if name == "digits":
        write_digits(data := Path("digits"), SPLITS)
    else:
        data = copy_cells(1200)
    return ep.fit_head(ep.extract(str(data), **BACKBONE))


def tuned(head: Any, **options: Any) -> dict[str, Any]:
    import embedpipe as ep

    start = time.monotonic()
    done = ep.finetune(head, **options)
    report = {**done.report, "run": done}
    epochs = [one["seconds"] for one in report["epochs"][1:]]
    say(f"{options}: {report['metrics']['test']['accuracy']:.3f}")
    return {**report, "whole_s": time.monotonic() - start, "epoch_s": Spread.of(epochs).median}


def layers(head: Any, seeds: int, epochs: int, unfrozen: list[str], lr: float) -> None:
    rows = [["head", "", _test([head.report]), f"{head.report['seconds']:.1f}", "", ""]]
    for unfreeze in unfrozen:
        runs = [tuned(head, unfreeze=unfreeze, epochs=epochs, lr=lr, seed=seed) for seed in range(seeds)]
        cut = "activations" if runs[0]["activations"]["cached"] else "images"
        seconds = Spread.of([run["epoch_s"] for run in runs]).text(), Spread.of([run["whole_s"] for run in runs]).text()
        rows.append([unfreeze, cut, _test(runs), *reversed(seconds), _gain(runs, head)])
    header = ["unfrozen", "trained on", "test accuracy", "whole s", "epoch s", "gain over the head, points"]
    print_table(f"Digits, lite0, {epochs} epochs at {lr:g}, {seeds} seeds", header, rows, *NOTES)


def start(head: Any, seeds: int, epochs: int) -> None:
    rows = []
    for init in ("head", "random"):
        runs = [tuned(head, unfreeze="blocks.6", epochs=epochs, seed=seed, init=init) for seed in range(seeds)]
        first = Spread.of([run["epochs"][0]["val_accuracy"] for run in runs]).text(3)
        rows.append([init, first, _test(runs)])
    header = ["start", "val accuracy at epoch 0", "test accuracy"]
    print_table(f"Digits, lite0, blocks.6, {epochs} epochs, {seeds} seeds", header, rows, *NOTES)


def views(head: Any, seeds: int, epochs: int, name: str) -> None:
    rows = []
    common = {"unfreeze": "blocks.6", "epochs": epochs, "augment": "standard"}
    for kept in (4, 0):
        runs = [tuned(head, **common, views=kept, seed=seed) for seed in range(seeds)]
        whole, epoch = (Spread.of([run[key] for run in runs]) for key in ("whole_s", "epoch_s"))
        twenty = whole.median + (20 - epochs) * epoch.median
        rows.append(
            ["four kept" if kept else "anew in every epoch", _test(runs), whole.text(), epoch.text(), f"{twenty:.0f}"]
        )
    header = ["views", "test accuracy", "whole s", "epoch s", "20 epochs, s"]
    print_table(
        f"{name}, lite0, blocks.6, {epochs} epochs", header, rows, *NOTES, "20 epochs: at the median epoch's rate"
    )


NOTES = ("test accuracy: each seed, and the 95 % interval of the first", "a run from the head on, activations included")


def _test(runs: list[dict[str, Any]]) -> str:
    scores = [run["metrics"]["test"] for run in runs]
    low, high = scores[0]["accuracy_ci95"]
    each = ", ".join(f"{one['accuracy']:.3f}" for one in scores)
    return f"{each} ({low:.3f}-{high:.3f})"


def _gain(runs: list[dict[str, Any]], head: Any) -> str:
    """Return the mean gain, and the paired interval of the first seed."""
    from embedpipe.commands.compare import compare

    before = head.report["metrics"]["test"]["accuracy"]
    mean = 100 * (sum(run["metrics"]["test"]["accuracy"] for run in runs) / len(runs) - before)
    low, high = compare([head, runs[0]["run"]], split="test").pairs[0].difference_ci95
    return f"{mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("layers", "start", "views"))
    parser.add_argument("--data", default="digits", choices=("digits", "elpv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--unfreeze", nargs="+", default=["blocks.6", "blocks.5", "all"])
    parser.add_argument("--lr", type=float, default=1e-3, help="of the unfrozen layers, for layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        head = prepared(options.data)
        asked = {"seeds": options.seeds, "epochs": options.epochs}
        if options.question == "views":
            views(head, **asked, name=options.data)
        elif options.question == "layers":
            layers(head, **asked, unfrozen=options.unfreeze, lr=options.lr)
        else:
            start(head, **asked)


if __name__ == "__main__":
    main()

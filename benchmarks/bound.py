"""How near does extraction on a CPU come to its bound?

The bound: cores / (decode_s + forward_s), core-seconds an image of both stages, each measured alone on one core. Cores that
share caches, memory bandwidth or a clock budget are slower together, so the same is printed with every core at it.

python benchmarks/bound.py --images 300 --repeats 3
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from measuring import EXECUTORS, Spread, answered, count_cores, interleave, one_or_more, print_table, run_way
from photos import SETS, add_options
from stages import STAGES, check_parity
from weights import write_weights

BACKBONES = ("resnet18", "resnet50", "tf_efficientnet_lite0", "vit_small_patch16_224")
TARGET = 0.85


def measure(folder: str, backbone: str, options: argparse.Namespace) -> list[str]:
    """Return the row of one backbone."""
    write_weights(backbone)
    common: dict[str, Any] = {"data": folder, "backbones": [backbone]}
    forward, cores = {**common, "executor": options.executor}, count_cores()
    with tempfile.TemporaryDirectory() as out:
        ours, reference = f"{out}/ours.npy", f"{out}/plain.npy"
        run_way(__file__, "plain", data=folder, backbone=backbone, save=reference)
        found = interleave(
            {
                "extract": lambda: run_way(__file__, "extract", **forward, save=ours),
                "decode alone": lambda: run_way(__file__, "decode", **common),
                "forward alone": lambda: run_way(__file__, "forward", **forward),
                "decode, all cores": lambda: run_way(__file__, "decode", **common, cores=cores),
                "forward, all cores": lambda: run_way(__file__, "forward", **forward, cores=cores),
            },
            options.repeats,
        )
        parity = check_parity(ours, reference)
    return [backbone, found["extract"][0]["executor"], *_figures(found, cores), f"{parity.centred:.0e}"]


def _figures(found: dict[str, list[dict[str, Any]]], cores: int) -> list[str]:
    """Turn repeats into cells; every ratio is taken within its repeat."""

    def each(name: str, key: str) -> list[float]:
        return [one[key] for one in found[name]]

    rates = each("extract", "rate")
    decoding, forwarding = each("decode alone", "core_s"), each("forward alone", "core_s")
    most_decoded, most_forwarded = each("decode, all cores", "rate"), each("forward, all cores", "rate")
    alone = [cores / (d + f) for d, f in zip(decoding, forwarding, strict=True)]
    together = [1 / (1 / d + 1 / f) for d, f in zip(most_decoded, most_forwarded, strict=True)]
    shares = [Spread.of([r / b for r, b in zip(rates, bound, strict=True)]) for bound in (alone, together)]
    ms = [Spread.of([1000 * s for s in seconds]).text() for seconds in (decoding, forwarding)]
    ceilings = [f"{Spread.of(values).median:.1f}" for values in (most_decoded, most_forwarded)]
    return [*ms, *ceilings, Spread.of(rates).text(), *(share.text(2) for share in shares)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, images=300)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument(
        "--executor",
        default="openvino",
        choices=EXECUTORS,
        help="of the forward pass; auto may stay with eager for few images",
    )
    options = parser.parse_args()
    folder = str(SETS[options.set](options.images))
    rows = [measure(folder, backbone, options) for backbone in options.backbones]
    header = ["backbone", "executor", "decode ms", "forward ms", "decode only/s", "forward only/s", "extract images/s"]
    header += ["of the bound, alone", "of the bound, all cores", "parity"]
    print_table(
        f"Extraction and its bound, {options.images} of {options.set}, random weights, {options.repeats} repeats",
        header,
        rows,
        f"target: {TARGET} of the bound cores / (decode + forward); each core-ms measured alone, on one core",
        "decode only, forward only: ceilings with every core at that stage; the bound of all cores is taken from them",
        "parity: largest centred cosine distance to PIL + torchvision transforms + eager torch",
    )


if __name__ == "__main__" and not answered(STAGES):
    main()

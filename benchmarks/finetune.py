"""What does an epoch of fine-tuning cost from cached activations, beside the loop of the tutorials?

An epoch is one pass over train and one over val, with the optimiser's step. The tutorial loop decodes every image in every
epoch and freezes by requires_grad. The bound: the tail and the head alone, on activations that lie in memory. Random weights.

python benchmarks/finetune.py --images 600 --repeats 3
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import Spread, answered, count_cores, interleave, one_or_more, print_table, run_way
from photos import SETS, add_options
from weights import read_model, recipe, write_weights

LAYERS = {"tf_efficientnet_lite0": "blocks.6", "resnet50": "layer4", "vit_small_patch16_224": "blocks.10"}
TARGETS = {"tf_efficientnet_lite0": 8.0, "resnet50": 2.5, "vit_small_patch16_224": 2.4}
BOUND_TARGET = 0.85
BATCH, RATE = 32, 1e-4


def ours(data: str, backbone: str, layer: str, epochs: int) -> dict[str, Any]:
    """Extract, fit a head, fine-tune; the seconds of the epochs that finetune tells, and of the tail alone."""
    import embedpipe as ep

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        loaded = ep.load_backbone(f"timm:{backbone}", weights=str(write_weights(backbone)))
        head = ep.fit_head(ep.extract(data, loaded, test_fraction=0.0), l2=1e-2)
        start = time.monotonic()
        tuned = ep.finetune(
            head, unfreeze=layer, epochs=epochs, lr=RATE, batch_size=BATCH, cache_activations="on", bn="frozen"
        )
        whole_s = time.monotonic() - start
        splits = {name: split["n"] for name, split in tuned.report["metrics"].items()}
        bound_s = tail_s(head, layer, head.report["n_train"], splits["val"])
    seconds = [epoch["seconds"] for epoch in tuned.report["epochs"][1:]]
    told = tuned.report["activations"]
    return {
        "epoch_s": Spread.of(seconds).median,
        "finetune_s": whole_s,
        "bound_s": bound_s,
        "cut": tuned.report["cut"],
        **told,
    }


def tail_s(head: Any, layer: str, n_train: int, n_val: int) -> float:
    """Return the seconds of an epoch of the tail and the head alone, the median of three."""
    import torch

    from embedpipe.backbones import cut_before, unfreeze_parameters
    from embedpipe.classifier.network import Network, release

    backbone = head.backbone
    network = Network(backbone.module, head.head)
    network.to(memory_format=torch.channels_last)
    release(network, backbone, [layer], bn="frozen")
    cut = cut_before(backbone, unfreeze_parameters(backbone, [layer]))
    network.backbone = cut.tail
    activations = torch.randn(BATCH, *cut.shape)
    if activations.ndim == 4:
        activations = activations.contiguous(memory_format=torch.channels_last)
    y = torch.randint(len(head.classes), (BATCH,))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.0)
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        network.eval()
        for _ in range(max(1, n_train // BATCH)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(activations), y).backward()
            optimizer.step()
        with torch.inference_mode():
            for _ in range(-(-n_val // BATCH)):
                network(activations)
        seconds.append(time.monotonic() - start)
    return Spread.of(seconds).median


def tutorial(data: str, backbone: str, layer: str, epochs: int) -> dict[str, Any]:
    """ImageFolder, DataLoader, requires_grad; 15 % of the images in val, as a hash split has."""
    import torch
    from torch.utils.data import DataLoader, random_split
    from torchvision.datasets import ImageFolder

    images = ImageFolder(data, recipe(backbone))
    held = round(0.15 * len(images))
    train, val = random_split(images, [len(images) - held, held], torch.Generator().manual_seed(0))
    model = read_model(backbone, headless=False)
    model.reset_classifier(len(images.classes))
    names = [name for name, _ in model.named_parameters()]
    first = next(number for number, name in enumerate(names) if name.startswith(layer + "."))
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number >= first)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loaders = {
        "train": DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=count_cores()),
        "val": DataLoader(val, batch_size=BATCH, num_workers=count_cores()),
    }
    seconds = [_epoch_s(model, optimizer, loaders) for _ in range(epochs)]
    return {"epoch_s": Spread.of(seconds).median}


def _epoch_s(model: Any, optimizer: Any, loaders: dict[str, Any]) -> float:
    import torch

    start = time.monotonic()
    model.train()
    for images, y in loaders["train"]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for images, _ in loaders["val"]:
            model(images)
    return time.monotonic() - start


WAYS = {"ours": ours, "tutorial": tutorial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, images=600)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbones", nargs="+", default=list(LAYERS))
    options = parser.parse_args()
    data = str(Path(SETS[options.set](options.images)).absolute())
    rows = []
    for backbone in options.backbones:
        write_weights(backbone)
        common = {"data": data, "backbone": backbone, "layer": LAYERS[backbone]}
        found = interleave(
            {
                "ours": lambda common=common: run_way(__file__, "ours", **common, epochs=4),
                "tutorial": lambda common=common: run_way(__file__, "tutorial", **common, epochs=1),
            },
            options.repeats,
        )
        rows.append(_row(backbone, found))
    print_table(
        f"An epoch of fine-tuning, {options.images} of {options.set}, {options.repeats} repeats",
        ["backbone", "unfrozen", "tutorial s", "ours s", "x", "target", "tail alone s", "of the bound", "stored"],
        rows,
        f"of the bound: target {BOUND_TARGET}",
        "stored: bytes of an image's activations; the trunk ran once, before the first epoch",
    )


def _row(backbone: str, found: dict[str, list[dict[str, Any]]]) -> list[object]:
    pairs = list(zip(found["ours"], found["tutorial"], strict=True))
    texts = [Spread.of([run["epoch_s"] for run in found[name]]).text(2) for name in ("tutorial", "ours")]
    times = Spread.of([theirs["epoch_s"] / our["epoch_s"] for our, theirs in pairs]).text()
    bounds = Spread.of([our["bound_s"] for our, _ in pairs]).text(2)
    share = Spread.of([our["bound_s"] / our["epoch_s"] for our, _ in pairs]).text(2)
    first = found["ours"][0]
    stored = f"{first['bytes'] // first['rows']:,} B, {first['stored_dtype']}"
    return [backbone, LAYERS[backbone], *texts, times, TARGETS[backbone], bounds, share, stored]


if __name__ == "__main__" and not answered(WAYS):
    main()

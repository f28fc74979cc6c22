"""Do decode and forward overlap where a device, not a core, does the forward pass? Without a GPU: with a stand-in for one.

The stand-in takes its time for a batch while it holds no core, one batch at a time. Decoders take theirs by sleeping in a
transform. The bound is 1 / max(decode, forward), both measured alone.

python benchmarks/overlap.py --batches 60 --repeats 3
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Spread, interleave, one_or_more, print_table
from PIL import Image

RATIOS = (0.2, 0.5, 0.8, 1.0, 1.25, 2.0, 5.0)  # decode over forward
BATCH = 8
WORKERS = 2
TARGET = 0.92


class Device:
    """A `Session` that takes `seconds` a batch, serially, and holds no core."""

    def __init__(self, seconds: float, feature_dim: int) -> None:
        self.seconds, self.feature_dim = seconds, feature_dim
        self._lock = threading.Lock()

    def __call__(self, shared_model: int, images: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            time.sleep(self.seconds)
        return [np.ones((len(images), self.feature_dim), np.float32)]


class Slow:
    """A transform that takes `seconds` an image and holds no core."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def to_dict(self) -> dict[str, float]:
        return {"sleep_s": self.seconds}

    def __call__(self, image: Image.Image) -> Any:
        import torch

        time.sleep(self.seconds)
        return torch.zeros(3, image.height, image.width)


def write_images(folder: Path, count: int) -> list[tuple[bytes, Path]]:
    """Write tiny images, which cost next to nothing to decode; their keys are the sha256 of their bytes."""
    import hashlib

    items = []
    for number in range(count):
        path = folder / f"{number:05d}.png"
        Image.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(path)
        items.append((hashlib.sha256(path.read_bytes()).digest(), path))
    return items


def measure(items: Sequence[tuple[bytes, Path]], decode_s: float, forward_s: float) -> tuple[float, float, float]:
    """Return seconds a batch of decode alone, of forward alone, and of both through `stream_rows`."""
    from dataclasses import replace

    from torch import nn

    import embedpipe as ep
    from embedpipe.images import image_batches
    from embedpipe.inference import InferenceSettings, Runner, stream_rows

    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    slow = Slow(decode_s * WORKERS / BATCH)
    backbone = ep.load_backbone(module, transform=slow, image_size=32)
    plan = replace(InferenceSettings(), batch_size=BATCH, workers=WORKERS, streams=2)
    runner = Runner([backbone], plan, session=Device(forward_s, backbone.feature_dim))
    batches = len(items) // BATCH

    def timed(run: Any) -> float:
        start = time.monotonic()
        run()
        return (time.monotonic() - start) / batches

    settings: dict[str, Any] = {"batch_size": BATCH, "workers": WORKERS}
    first = list(image_batches(items[:BATCH], runner.windows, **settings))  # to its end: decoders are there now, idle
    alone = timed(lambda: list(image_batches(items, runner.windows, **settings, in_order=False)))
    device = timed(lambda: [runner(first[0].images) for _ in range(batches)])
    return alone, device, timed(lambda: list(stream_rows(items, runner)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=one_or_more, default=60)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--slower-ms", type=float, default=60, help="of a batch in the slower stage")
    options = parser.parse_args()
    slower_s = options.slower_ms / 1000
    with tempfile.TemporaryDirectory() as name:
        items = write_images(Path(name), options.batches * BATCH)

        def start(ratio: float) -> tuple[float, float, float]:
            return measure(items, slower_s * min(1, ratio), slower_s * min(1, 1 / ratio))

        ways = {f"{ratio:g}": (lambda ratio=ratio: start(ratio)) for ratio in options.ratios}
        found = interleave(ways, options.repeats)
    rows = []
    for name, runs in found.items():
        decoding, forwarding, together = ([1000 * one[n] for one in runs] for n in range(3))
        shares = Spread.of([max(d, f) / t for d, f, t in zip(decoding, forwarding, together, strict=True)])
        rows.append((name, *(Spread.of(ms).text() for ms in (decoding, forwarding, together)), shares.text(3)))
    print_table(
        f"Overlap of decode and a serial device, {options.batches} batches of {BATCH}, {options.repeats} repeats",
        ("decode / forward", "decode alone, ms a batch", "forward alone", "both", "of 1 / max"),
        rows,
        f"target: {TARGET} everywhere; the first decode and the last forward pass, which nothing can hide, are counted",
    )


if __name__ == "__main__":
    main()

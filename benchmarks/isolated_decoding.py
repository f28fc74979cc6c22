"""What it costs that images are decoded in processes that may die: the same photos in threads and in processes, interleaved.

python benchmarks/isolated_decoding.py --images 400 --repeats 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measuring import Spread, interleave, one_or_more, print_table
from photos import SETS, add_options, list_images

from embedpipe.images import Transform, decode_image, image_batches

TRANSFORM = Transform(crop_size=(224, 224), resize_size=256)


def in_threads(paths: Sequence[Path], workers: int) -> np.ndarray:
    """Return uint8 (N, H, W, 3), decoded by threads of this process."""
    with ThreadPoolExecutor(workers) as executor:
        return np.stack(list(executor.map(lambda path: TRANSFORM.window(decode_image(path.read_bytes())), paths)))


def in_processes(paths: Sequence[Path], workers: int) -> np.ndarray:
    """Return the same, decoded as `extract` does."""
    items = [(None, path) for path in paths]
    return np.concatenate([b.images[0] for b in image_batches(items, [TRANSFORM], batch_size=32, workers=workers)])


def timed(way: Callable[[Sequence[Path], int], np.ndarray], paths: Sequence[Path], workers: int) -> float:
    """Return images a second; normalising, which comes afterwards for both, is left out."""
    start = time.monotonic()
    way(paths, workers)
    return len(paths) / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, images=400)
    parser.add_argument("--repeats", type=one_or_more, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    paths = list_images(SETS[options.set](options.images))
    if not np.array_equal(in_threads(paths[:64], options.workers), in_processes(paths[:64], options.workers)):
        raise SystemExit("threads and processes give different pixels")  # and both are warm now
    ways = {"threads": in_threads, "processes": in_processes}
    starts = {name: (lambda way=way: timed(way, paths, options.workers)) for name, way in ways.items()}
    rates = interleave(starts, options.repeats)
    rows = []
    for name, found in rates.items():
        ratios = Spread.of([rate / base for rate, base in zip(found, rates["threads"], strict=True)])
        rows.append((name, Spread.of(found).text(0), ratios.text(2)))
    title = f"Decoding apart, {options.images} of {options.set}, {options.workers} workers, {options.repeats} repeats"
    print_table(title, ("decoded in", "images/s", "of threads"), rows, "the pixels of both are equal, bit for bit")


if __name__ == "__main__":
    main()

"""What it costs that images are decoded in processes that may die: the same photos in threads and in processes, interleaved.

python benchmarks/isolated_decoding.py --images 400 --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from embedpipe.images import Transform, decode_image, image_batches

TRANSFORM = Transform(crop_size=(224, 224), resize_size=256)


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write crops of two real photographs, 500 x 375, quality 90."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    paths = []
    for k in range(count):
        left, top = (7 * k) % 140, (3 * k) % 52
        paths.append(folder / f"{k:05d}.jpg")
        photos[k % 2].crop((left, top, left + 500, top + 375)).save(paths[-1], quality=90)
    return paths


def in_threads(paths: list[Path], workers: int) -> torch.Tensor:
    with ThreadPoolExecutor(workers) as executor:
        return torch.stack(list(executor.map(lambda path: TRANSFORM(decode_image(path.read_bytes())), paths)))


def in_processes(paths: list[Path], workers: int) -> torch.Tensor:
    items = [(None, path) for path in paths]
    return torch.cat([b.images for b in image_batches(items, TRANSFORM, batch_size=32, workers=workers)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    ways: dict[str, Callable[[list[Path], int], torch.Tensor]] = {"threads": in_threads, "processes": in_processes}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        paths = write_photos(Path(name), options.images)
        assert torch.equal(*(way(paths[:64], options.workers) for way in ways.values()))  # and both are warm now
        for _ in range(options.repeats):
            for way, run in ways.items():
                start = time.monotonic()
                run(paths, options.workers)
                rates[way].append(len(paths) / (time.monotonic() - start))
    print(f"{'decoded in':<12}{'images/s':>10}{'min':>8}{'max':>8}{'ratio':>8}")
    base = statistics.median(rates["threads"])
    for way, values in rates.items():
        middle = statistics.median(values)
        print(f"{way:<12}{middle:>10.0f}{min(values):>8.0f}{max(values):>8.0f}{middle / base:>8.2f}")


if __name__ == "__main__":
    main()

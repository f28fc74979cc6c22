"""The stages of an extraction by themselves, and all together; each is a way to be run in a process of its own.

`decode` reads, checks, decodes and resizes; `forward` runs images that are decoded already; `extract` is the whole.
Imported by the scripts that hold the whole against its parts.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Parity, Way, count_cores, extract_steadily
from photos import list_images
from weights import read_model, recipe, write_weights

HELD = 32  # decoded images that `forward` goes round


def load(backbone: str, layers: list[str] | None = None) -> list[Any]:
    """Return embedpipe's backbone with the seeded weights, at each of the layers."""
    import embedpipe as ep
    from embedpipe.backbones import at_layer

    first = ep.load_backbone(f"timm:{backbone}", weights=write_weights(backbone))
    return [at_layer(first, layer) for layer in layers] if layers else [first]


def open_runner(data: str, backbones: list[str], executor: str, *, streams: int) -> Any:
    """Return a warm runner of one thread a stream."""
    from embedpipe.inference import resolve_settings, select_executor

    loaded = [one for backbone in backbones for one in load(backbone)]
    plan = resolve_settings(device="cpu", batch_size="auto", workers="auto", executor=executor)
    plan = replace(plan, streams=streams, threads=1)
    return select_executor(loaded, plan, _items(data), work=100_000)


def _items(data: str) -> list[tuple[bytes, Path]]:
    return [(hashlib.sha256(path.read_bytes()).digest(), path) for path in list_images(Path(data))]


def decode(data: str, backbones: list[str], cores: int = 1) -> dict[str, Any]:
    """Decode all images for the backbones, in as many processes as cores; no pipe, no forward pass."""
    windows = [load(backbone)[0].transform.geometry for backbone in backbones]
    windows = list(dict.fromkeys(windows))
    items = _items(data)
    shares = [(items[core::cores], windows) for core in range(cores)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores) as pool:
        pool.map(_decode_share, [(share[:8], windows) for share, _ in shares], chunksize=1)  # imports, warm
        start = time.monotonic()
        busy_s = sum(pool.map(_decode_share, shares, chunksize=1))
        wall_s = time.monotonic() - start
    return {"images": len(items), "rate": len(items) / wall_s, "core_s": busy_s / len(items)}


def _decode_share(share: tuple[list[tuple[bytes, Path]], list[Any]]) -> float:
    from embedpipe.images._resampling import Resampler
    from embedpipe.images._serving import load_image

    (items, windows), resample = share, Resampler()  # as decoders do when they have loaded it
    start = time.monotonic()
    for key, path in items:
        image = load_image(path.read_bytes(), key.hex())
        for window in windows:
            window.window(image, "", resample)
    return time.monotonic() - start


def forward(data: str, backbones: list[str], executor: str, cores: int = 1) -> dict[str, Any]:
    """Run images that are decoded already through the backbones, one thread a stream, as many streams as cores."""
    from embedpipe.inference._settings import torch_threads

    runner = open_runner(data, backbones, executor, streams=cores)
    batches = _held(data, runner)
    images = len(list_images(Path(data)))
    calls = -(-images // runner.settings.batch_size)
    with torch_threads(1), ThreadPoolExecutor(cores) as pool:
        list(pool.map(runner, batches[:cores]))  # every thread is warm
        start = time.monotonic()
        list(pool.map(lambda call: runner(batches[call % len(batches)]), range(calls)))
        wall_s = time.monotonic() - start
    done = calls * runner.settings.batch_size
    return {"rate": done / wall_s, "core_s": wall_s * cores / done, "executor": runner.settings.executor}


def _held(data: str, runner: Any) -> list[list[np.ndarray]]:
    from embedpipe.images import image_batches

    size = runner.settings.batch_size
    batches = image_batches(_items(data)[: max(HELD, size)], runner.windows, batch_size=size, workers=count_cores())
    return [runner.pad(batch.images) for batch in batches]


def extract(
    data: str, backbones: list[str], executor: str, layers: list[str] | None = None, save: str | None = None
) -> dict[str, Any]:
    """Extract with embedpipe into a fresh cache."""
    loaded = [one for backbone in backbones for one in load(backbone, layers)]
    found = extract_steadily(data, loaded, executor=executor, save=save)
    return {**found, "rate": found["images"] / found["steady_s"]}


def plain(data: str, backbone: str, save: str) -> dict[str, Any]:
    """Write the features of the plain recipe: PIL, torchvision's transforms, eager torch."""
    import torch
    from measuring import save_features
    from PIL import Image

    model, transform, paths = read_model(backbone), recipe(backbone), list_images(Path(data))
    with torch.no_grad():
        found = [model(transform(Image.open(path).convert("RGB"))[None])[0].numpy() for path in paths]
    save_features(save, paths, np.stack(found))
    return {}


def check_parity(found: str, reference: str, tolerance: float = 1e-7) -> Parity:
    """Return how far features are from those of the plain recipe.

    Raises
    ------
    SystemExit    too far
    """
    parity = Parity.of(np.load(found), np.load(reference))
    if parity.centred > tolerance:
        raise SystemExit(f"features differ from the plain recipe: {parity}, expected at most {tolerance:g} centred")
    return parity


STAGES: dict[str, Way] = {"decode": decode, "forward": forward, "extract": extract, "plain": plain}

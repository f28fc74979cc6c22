"""Does `advise` name the right action? Six data sets, and what `--verify` measures to be best on each.

    python benchmarks/advise.py /usr/share/tuxpaint/stamps

Like ImageNet: animals (photo-like stamps of Debian's tuxpaint-stamps-default) on scikit-learn's photographs. Unlike it:
scikit-learn's digits, as they are and scattered in noise. EfficientNet-Lite0 with ImageNet weights, images of 96 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_images

SIDE = 128
Splits = dict[str, int]


def write_scenes(folder: Path, stamps: Path, per_class: Splits, *, species: int, size: tuple[float, float]) -> Path:
    """Write `<split>/<animal>/<k>.jpg`: one animal, any place and light, on a part of a photograph; its size as a share of it."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    kinds = [p for kind in ("mammals", "birds") for p in sorted((stamps / "animals" / kind).rglob("*.png"))]
    kinds = [path for path in kinds if not {"cartoon", "toys"} & set(path.parts)]
    chosen = [kinds[k] for k in np.linspace(0, len(kinds) - 1, species).astype(int)]
    for path in chosen:
        animal = Image.open(path).convert("RGBA")
        for split, count in per_class.items():
            for k in range(count):
                out = folder / split / path.stem / f"{k:03d}.jpg"
                out.parent.mkdir(parents=True, exist_ok=True)
                _scene(animal, photos, size, rng).save(out, quality=int(rng.integers(60, 95)))
    return folder


def _scene(
    animal: Image.Image, photos: list[Image.Image], size: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(SIDE, 400))
    left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
    scene = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    shown = animal.rotate(float(rng.normal(0, 20)), expand=True, resample=Image.Resampling.BICUBIC)
    shown.thumbnail((int(SIDE * rng.uniform(*size)),) * 2)
    if rng.random() < 0.5:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    place = tuple(int(rng.integers(0, SIDE - size + 1)) for size in shown.size)
    scene.paste(
        ImageEnhance.Brightness(shown.convert("RGB")).enhance(rng.uniform(0.5, 1.3)), place, shown.getchannel("A")
    )
    return scene


def write_digits(folder: Path, splits: Splits, *, wrong: float = 0.0, scattered: bool = False) -> Path:
    """Write `<split>/<digit>/<number>.png`; a share of labels of train and val wrong; scattered: any place and size in noise."""
    rng, digits = np.random.default_rng(0), load_digits()
    order = rng.permutation(len(digits.target)).tolist()
    for split, count in splits.items():
        for number in [order.pop() for _ in range(count)]:
            label = int(digits.target[number])
            if split != "test" and rng.random() < wrong:
                label = (label + int(rng.integers(1, 10))) % 10
            pixels = np.pad((digits.images[number] * (255 / 16)).round().astype(np.uint8), 1)
            image = _scatter(pixels, rng) if scattered else Image.fromarray(pixels)
            out = folder / split / str(label) / f"{number:04d}.png"
            out.parent.mkdir(parents=True, exist_ok=True)
            image.save(out)
    return folder


def _scatter(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(24, 65))
    digit = Image.fromarray(pixels).rotate(float(rng.normal(0, 10))).resize((side, side), Image.Resampling.BICUBIC)
    scene = np.clip(rng.normal(60, 40, (SIDE, SIDE)), 0, 255)
    left, top = rng.integers(0, SIDE - side + 1, 2)
    scene[top : top + side, left : left + side] += 0.7 * np.asarray(digit)
    return Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))

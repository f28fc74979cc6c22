"""Does `advise` name the right action? Six data sets, and what `--verify` measures to be best on each.

    python benchmarks/advise.py /usr/share/tuxpaint/stamps

Like ImageNet: animals (photo-like stamps of Debian's tuxpaint-stamps-default) on scikit-learn's photographs. Unlike it:
scikit-learn's digits, as they are and scattered in noise. EfficientNet-Lite0 with ImageNet weights, images of 96 pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import print_table, say
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_digits, load_sample_images

import embedpipe as ep

BACKBONE = "timm:tf_efficientnet_lite0"
SIDE, IMAGE_SIZE = 128, 96
Splits = dict[str, int]


@dataclass(frozen=True)
class Case:
    """A data set: its name, the actions that would be right by theory, and what writes it into a folder."""

    name: str
    right: tuple[str, ...]
    write: Callable[[Path], object]


def cases(stamps: Path) -> list[Case]:
    tuning = ("finetune", "finetune-all")

    def scenes(n: Splits, species: int, size: tuple[float, float], blur: float = 0) -> Callable[[Path], object]:
        return lambda folder: write_scenes(folder, stamps, n, species=species, size=size, blur=blur)

    return [
        Case("small, similar", ("linear-head",), scenes({"train": 6, "val": 4, "test": 25}, 12, (0.9, 1.0), blur=20)),
        Case("large, similar", tuning, scenes({"train": 32, "val": 10, "test": 20}, 16, (0.55, 0.9))),
        Case(
            "small, different",
            ("earlier-layer", "several-layers"),
            lambda folder: write_digits(folder, {"train": 40, "val": 20, "test": 397}),
        ),
        Case(
            "large, different",
            tuning,
            lambda folder: write_digits(folder, {"train": 600, "val": 200, "test": 300}, scattered=True),
        ),
        Case(
            "wrong labels",
            ("fix-labels",),
            lambda folder: write_digits(folder, {"train": 600, "val": 200, "test": 397}, wrong=0.2),
        ),
        Case("leak", ("fix-leaks",), write_leak),
    ]


def write_scenes(
    folder: Path, stamps: Path, per_class: Splits, *, species: int, size: tuple[float, float], blur: float = 0
) -> Path:
    """Write `<split>/<animal>/<k>.jpg`: one animal, any place and light, on a part of a photograph; its size as a share of it."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo).filter(ImageFilter.GaussianBlur(blur)) for photo in load_sample_images().images]
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


def write_leak(folder: Path) -> Path:
    """Write digits; a tenth of val and test is in train, too, every second one encoded anew."""
    rng = np.random.default_rng(0)
    write_digits(folder, {"train": 300, "val": 100, "test": 300})
    for split in ("val", "test"):
        files = sorted((folder / split).rglob("*.png"))
        for k, number in enumerate(rng.permutation(len(files))[: len(files) // 10].tolist()):
            twin = folder / "train" / files[number].parent.name / files[number].name
            if k % 2:
                twin.write_bytes(files[number].read_bytes())
            else:
                Image.open(files[number]).save(twin.with_suffix(".jpg"), quality=95)
    return folder


def try_case(case: Case, folder: Path, epochs: int) -> list[str]:
    """Write the data set, take advice and try it; return the row of the table."""
    start, data = time.monotonic(), folder / case.name.replace(", ", "-").replace(" ", "-")
    case.write(data)
    options = {"weights": "packaged", "layer": ("penultimate", "all"), "image_size": IMAGE_SIZE}
    features = ep.extract(data, BACKBONE, cache_dir=folder / "cache", **options)
    done = ep.advise(
        features, verify=True, epochs=epochs, cache_dir=folder / "cache", runs_dir=folder / "runs"
    ).to_dict()
    found = done["verify"]
    say(f"{case.name}: {done['reason']}; {found['why']}")
    gain, interval = done["expected_gain"], done["expected_gain_ci95"]
    tried = ", ".join(f"{one['action']} {100 * one['accuracy']:.1f}" for one in found["tried"])
    return [
        case.name,
        str(done["evidence"]["n_train"]),
        " ".join([done["action"], done["layer"] or ""]).strip(),
        "yes" if done["action"] in case.right else "no",
        "" if gain is None else f"{gain:+.1f} ({interval[0]:+.1f} to {interval[1]:+.1f})",
        f"{tried}; n = {found['n']}",
        "yes" if found["right"] else f"no: {found['why']}",
        f"{(time.monotonic() - start) / 60:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="folder of tuxpaint's stamps")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", action="append", help="name of a case; repeatable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [case for case in cases(options.stamps) if not options.only or case.name in options.only]
        rows = [try_case(case, Path(folder), options.epochs) for case in chosen]
    header = ("case", "train", "advice", "as in theory", "expected, points", "on test, %", "right", "minutes")
    print_table(f"Advice, {options.epochs} epochs of fine-tuning", header, rows)


if __name__ == "__main__":
    main()

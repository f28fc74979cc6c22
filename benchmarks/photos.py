"""Sets of images to measure with: photos made of sample photographs, and real ones of solar cells.

python benchmarks/photos.py --images 2000
python benchmarks/photos.py --images 500 --set elpv
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measuring import HERE, Spread, one_or_more, print_table
from PIL import Image, ImageEnhance, ImageOps

FOLDER = HERE / ".photos"  # beside these scripts, git-ignored
SIZE = (500, 375)  # px; of many photos of ImageNet
QUALITY = 90
PICTURES = 2000  # pictures that differ; more files repeat them with other bytes
SEED = 20
SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")  # lie in its wheel
SKLEARN = ("china.jpg", "flower.jpg")


def make_photos(images: int, folder: Path = FOLDER) -> Path:
    """Return a folder with `images` photos of 500 x 375 px, a class for each photograph that they are cut from.

    The same number gives the same bytes; what was made before is reused.
    """
    return _once(folder / f"photos-{images}", lambda fresh: _write_photos(fresh, images))


def copy_cells(images: int, folder: Path = FOLDER) -> Path:
    """Return a folder with the first `images` photos of elpv-dataset (300 x 300 px, grey PNG) in two classes."""
    return _once(folder / f"elpv-{images}", lambda fresh: _copy_cells(fresh, images))


SETS = {"photos": make_photos, "elpv": copy_cells}


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let a folder be written whole, or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            (fresh := Path(name) / folder.name).mkdir()
            write(fresh)
            fresh.rename(folder)
    return folder


def _write_photos(folder: Path, images: int) -> None:
    sources = [(path.stem, Image.open(path).convert("RGB")) for path in source_photos()]
    for name, _ in sources:
        (folder / name).mkdir()
    for number in range(images):
        name, source = sources[number % len(sources)]
        path = folder / name / f"{number:05d}.jpg"
        if number < PICTURES:
            take_photo(source, np.random.default_rng((SEED, number))).save(path, quality=QUALITY)
        else:
            first = number % (PICTURES // len(sources) * len(sources))  # of the same class
            path.write_bytes(_with_comment((folder / name / f"{first:05d}.jpg").read_bytes(), str(number)))


def take_photo(source: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut a random window, mirror it, change its light, and add the noise of a sensor."""
    share = rng.uniform(0.4, 1.0)
    width = share * min(source.width, source.height * SIZE[0] / SIZE[1])
    height = width * SIZE[1] / SIZE[0]
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    photo = source.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        photo = ImageOps.mirror(photo)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
        photo = enhance(photo).enhance(rng.uniform(0.8, 1.2))
    noise = rng.normal(0, rng.uniform(3, 8), (SIZE[1], SIZE[0], 1))
    return Image.fromarray(np.clip(np.asarray(photo) + noise, 0, 255).astype(np.uint8))


def _with_comment(jpeg: bytes, text: str) -> bytes:
    """Return the same picture in other bytes: with a comment after the start of the image."""
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]


def source_photos() -> list[Path]:
    """Return the photographs that two packages carry; neither is imported."""
    pairs = [("sklearn", "datasets/images", SKLEARN), ("skimage", "data", SKIMAGE)]
    return [_package(package, package) / part / name for package, part, names in pairs for name in names]


def _package(module: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"no {distribution} here, expected one for the photos in it; run these scripts by `make bench`"
        )
    return Path(spec.submodule_search_locations[0])


def _copy_cells(folder: Path, images: int) -> None:
    data = _package("elpv_dataset", "elpv-dataset") / "data"
    for path, defect_probability in list(_cells(data / "labels.csv"))[:images]:
        home = folder / ("defective" if defect_probability >= 0.5 else "functional")
        home.mkdir(exist_ok=True)
        shutil.copyfile(data / path, home / Path(path).name)


def _cells(table: Path) -> Iterator[tuple[str, float]]:
    with table.open(newline="") as lines:
        for row in csv.reader(lines, delimiter=" ", skipinitialspace=True):
            yield row[0], float(row[1])


def list_images(folder: Path) -> list[Path]:
    """Return the images in class folders, sorted as all loaders here sort them."""
    return sorted(path for path in folder.glob("*/*") if path.suffix in (".jpg", ".png"))


def add_options(parser: argparse.ArgumentParser, *, images: int) -> None:
    """Add the options that say which images."""
    parser.add_argument("--images", type=one_or_more, default=images)
    parser.add_argument("--set", choices=SETS, default="photos", help="elpv needs `pip install --no-deps elpv-dataset`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, images=PICTURES)
    options = parser.parse_args()
    folder = SETS[options.set](options.images)
    sizes: dict[str, list[float]] = {}
    for path in list_images(folder):
        sizes.setdefault(path.parent.name, []).append(path.stat().st_size / 1000)
    rows = [(name, len(found), Spread.of(found).text()) for name, found in sizes.items()]
    print_table(f"{options.set} in {folder.name}", ("class", "images", "kB a file, median (min-max)"), rows)


if __name__ == "__main__":
    main()

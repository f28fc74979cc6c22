"""Nine labelled sets of real images, split by group, and tables whose cells are measured once.

    python benchmarks/sets.py --data FOLDER      # unpack and extract: 15 minutes on 2 cores

FOLDER holds aerial.tar, bees.tar, greek.tar, pcb.tar, stylised.tar and trash.tar, each of class folders. The others are
scikit-learn's digits, the solar cells of elpv-dataset, and the category folders of Debian's tuxpaint-stamps-default.
Defaults are chosen on DEVELOPED alone; REPORTED is scored with the defaults as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import HERE, say
from photos import copy_cells

import embedpipe as ep
from embedpipe.cache import Cache
from embedpipe.data import Sample
from embedpipe.features import open_features

FOLDER = (HERE / ".sets").resolve()  # beside these scripts, git-ignored
STAMPS = Path("/usr/share/tuxpaint/stamps")
ELPV_IMAGES = 2624
DEVELOPED, REPORTED = ("digits", "elpv", "stamps", "trash"), ("aerial", "bees", "greek", "pcb", "stylised")
NAMES = (*DEVELOPED, *REPORTED)
BACKBONES: dict[str, dict[str, Any]] = {
    "lite0": {"backbone": "timm:tf_efficientnet_lite0"},
    "vit": {"backbone": "timm:vit_small_patch14_dinov2", "image_size": 224},
}
# what images of one group share: the writer, the scan, the shape
GROUPS = {"greek": r".*_(\d+)\.jpg", "pcb": r"(\d{8})_.*", "stylised": r"([a-z]+\d+)-.*"}
TEST = 0.4  # share of the groups


def prepare(name: str, data: Path) -> Path:
    """Return a folder of class folders."""
    folder = FOLDER / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == "digits":
        _write_digits(folder)
    elif name == "elpv":
        shutil.copytree(copy_cells(ELPV_IMAGES), folder)
    elif name == "stamps":
        shutil.copytree(
            STAMPS, folder, ignore=lambda _, names: [n for n in names if Path(n).suffix not in ("", ".png")]
        )
    else:
        with tarfile.open(data / f"{name}.tar") as tar:
            tar.extractall(folder, filter="data")
    return folder


def _write_digits(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        home = folder / str(label)
        home.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels.reshape(8, 8) * 255 / 16).astype(np.uint8))
        image.resize((128, 128), Image.Resampling.BICUBIC).save(home / f"{number:04d}.png")


def open_set(name: str, backbone: str, data: Path, *, layers: str = "penultimate") -> ep.FeatureSet:
    """Return the cached features of a set; extract them if they are not there."""
    cache, folder = FOLDER / "cache", prepare(name, data)
    asked = BACKBONES[backbone]["backbone"]
    options = {"weights": "packaged", "layer": ["penultimate", "all"], "cache_dir": str(cache)}
    done = FOLDER / f".{name}-{backbone}"
    if not done.exists():
        say(f"extracting {name} with {backbone}")
        ep.extract(str(folder), **BACKBONES[backbone], **options)
        done.touch()
    return open_features(Cache(cache), str(folder), backbone=asked, layer=layers)


def split_anew(name: str, samples: Iterable[Sample], seed: int, per_class: int | None) -> tuple[Sample, ...]:
    """Return the samples of a random split by group: `per_class` training images, a quarter as many of val, and test.

    40 % of the groups are test, and a fifth of the others val; None takes all of them.
    """
    samples = sorted((one for one in samples if one.label is not None), key=lambda one: one.path)
    pattern, rng = GROUPS.get(name), np.random.default_rng((seed, NAMES.index(name)))
    groups = [re.fullmatch(pattern, Path(one.path).name)[1] if pattern else one.path for one in samples]
    strata = dict(zip(groups, ("" if name in ("greek", "pcb") else one.label for one in samples), strict=True))
    split: dict[str, str] = {}
    for stratum in sorted({*strata.values()}):
        mine = rng.permutation(sorted(group for group in strata if strata[group] == stratum)).tolist()
        test = round(TEST * len(mine))
        val = test + round((len(mine) - test) / 5)
        split |= {group: "test" if k < test else "val" if k < val else "train" for k, group in enumerate(mine)}
    classes = sorted({one.label for one in samples})
    limits: dict[tuple[str, str], float] = {}
    for number, label in enumerate(classes):
        if per_class is not None:
            limits["train", label] = per_class
            limits["val", label] = (per_class + 2 * (number % 2)) // 4  # a quarter in the mean
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for k in rng.permutation(len(samples)).tolist():
        place = split[groups[k]], samples[k].label
        taken[place] = taken.get(place, 0) + 1
        if taken[place] <= limits.get(place, np.inf):
            chosen.append(replace(samples[k], split=place[0], group=groups[k] if pattern else None))
    return tuple(sorted(chosen, key=lambda one: one.path))


def with_samples(features: ep.FeatureSet, samples: tuple[Sample, ...]) -> ep.FeatureSet:
    classes = tuple(sorted({sample.label or "" for sample in samples if sample.split == "train"}))
    known = tuple(sample for sample in samples if sample.label in classes)
    return replace(features, manifest=replace(features.manifest, samples=known, classes=classes))


def measure_cells(
    file: Path, cells: Iterable[dict[str, Any]], measure: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure each cell that the file lacks, append a line for it with the commit, and return the lines of all cells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = []
    for cell in cells:
        line = next((one for one in lines if {**one, **cell} == one), None)
        if line is None:
            line = {**cell, **measure(**cell), "commit": _commit()}
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            say(json.dumps(line))
        found.append(line)
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def commits(lines: Iterable[dict[str, Any]]) -> str:
    """Return a note that names the commits of cells."""
    return f"measured at {', '.join(sorted({line['commit'] for line in lines}))}"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval over cells."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    return float(np.mean(values)), *map(float, np.quantile(draws, [0.025, 0.975]))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of the six tars")
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=tuple(BACKBONES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    for backbone in options.backbones:
        for name in options.sets:
            features = open_set(name, backbone, options.data)
            say(f"{name}, {backbone}: {len(features.manifest.samples)} images")


if __name__ == "__main__":
    main()

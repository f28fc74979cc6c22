"""Features of seeded backbones on images from a formula, against stored ones.

The stored rows were written by embedpipe 0.1.0 with `--weights none`, the eager executor and batches of 4. Sums are ordered
differently on other processors and by other versions of torch, so a row may differ by 1e-5 of its length.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest

import embedpipe as ep
from tests.contract.conftest import RECORD, CommandLine, wave, write_image

FEATURES_FILE = Path(__file__).with_name("features.npz")
BACKBONES = (
    "timm:resnet18",
    "timm:regnetx_002",
    "timm:mobilenetv3_small_050",
    "timm:convnext_atto",
    "timm:vit_tiny_patch16_224",
    "torchvision:resnet18",
)
IMAGES = 4
TOLERANCE = 1e-5  # of a row's length


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    folder = tmp_path_factory.mktemp("features")
    for seed in range(IMAGES):
        write_image(folder / "images" / f"{seed}.png", wave(seed, 96))
    return CommandLine(folder)


def extract_rows(run: CommandLine, backbone: str) -> np.ndarray:
    """Extract the images and return the stored features (N, D) float32 in the order of the images."""
    options = ("--weights", "none", "--executor", "eager", "--batch-size", IMAGES, "--device", "cpu")
    data = run("extract", "images", "--backbone", backbone, *options, "--json").data
    assert data["computed"] == IMAGES
    with h5py.File(run.folder / data["features"]) as file:
        rows, keys = file["features"][:], [bytes(key) for key in file["keys"][:]]
    digests = [sha256((run.folder / "images" / f"{seed}.png").read_bytes()).digest() for seed in range(IMAGES)]
    return rows[[keys.index(digest) for digest in digests]]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features(run: CommandLine, backbone: str) -> None:
    rows = extract_rows(run, backbone)
    stored = dict(np.load(FEATURES_FILE)) if FEATURES_FILE.exists() else {}
    if RECORD and backbone not in stored:
        np.savez_compressed(FEATURES_FILE, **stored, **{backbone: rows})
        stored[backbone] = rows
    assert rows.dtype == np.float32
    assert rows.shape == stored[backbone].shape
    difference = np.linalg.norm(rows.astype(float) - stored[backbone], axis=1)
    length = np.linalg.norm(stored[backbone].astype(float), axis=1)
    assert (difference <= TOLERANCE * length).all(), (difference / length).max()


def test_stored_rows_tell_images_apart() -> None:
    """Rows of different images differ by far more than the tolerance."""
    for rows in dict(np.load(FEATURES_FILE)).values():
        length = np.linalg.norm(rows, axis=1)
        between = np.linalg.norm(rows[:, None] - rows[None], axis=-1)[np.triu_indices(IMAGES, 1)]
        assert between.min() > 100 * TOLERANCE * length.max()


def test_python_and_the_command_line_give_the_same_features(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder)
    name = BACKBONES[2]
    backbone = ep.load_backbone(name, weights="none")
    options = {"executor": "eager", "batch_size": IMAGES, "device": "cpu"}
    features = ep.extract("images", backbone, cache_dir="python-cache", **options)
    X, _ = features.arrays()
    stored = np.load(FEATURES_FILE)[name]
    assert [Path(path).name for path in features.paths()] == [f"{seed}.png" for seed in range(IMAGES)]
    assert (np.linalg.norm(X - stored, axis=1) <= TOLERANCE * np.linalg.norm(stored, axis=1)).all()

"""The canonical transform gives the pixels of torchvision and timm, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from embedpipe.errors import DecodeError
from embedpipe.images import Transform
from embedpipe.images._augment import CHANGES

SIZES = [(500, 375), (375, 500), (64, 64), (31, 97), (224, 224), (225, 300), (7, 5), (256, 256)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (224, 224), (65, 57), (60, 65)])
@pytest.mark.parametrize("size", SIZES)
def test_torchvision_preset(size: tuple[int, int], crop: int, resize: int, interpolation: str) -> None:
    preset = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation))
    ours = Transform((crop, crop), resize, interpolation=interpolation)
    image = noise(*size)
    assert torch.equal(ours(image), preset(image))


def timm_twin(config: dict[str, Any]) -> Transform:
    """The Transform of a timm data configuration, as a loader would write it."""
    crop = config["input_size"][1:]
    scale = tuple(int(side / config["crop_pct"]) for side in crop)
    mode = {"center": "short"}.get(config["crop_mode"], config["crop_mode"])
    return Transform(
        crop_size=crop,
        resize_size=scale[0] if mode == "short" and scale[0] == scale[1] else scale,
        resize_mode=mode,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("input_size", [(3, 224, 224), (3, 96, 128), (3, 97, 61)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_timm_evaluation_transform(
    size: tuple[int, int], crop_pct: float, input_size: tuple[int, int, int], crop_mode: str, interpolation: str
) -> None:
    asked = {
        "input_size": input_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": (0.5, 0.45, 0.4),
        "std": (0.25, 0.5, 0.3),
    }
    config = resolve_data_config(asked)
    image = noise(*size)
    assert torch.equal(timm_twin(config)(image), create_transform(**config)(image))


def test_bgr_reverses_channels_and_takes_mean_in_that_order() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    transform = Transform((8, 8), 8, mean=(0.2, 0.0, 0.0), std=(1.0, 1.0, 0.5), channels="bgr", interpolation="nearest")
    assert transform(image)[:, 0, 0].tolist() == [0.0, 0.0, 2.0]


def test_border_of_bgr_is_the_mean_colour() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    transform = Transform((8, 8), (8, 8), "border", mean=(0.2, 0.4, 0.8), std=(1.0, 1.0, 1.0), channels="bgr")
    assert transform(image)[:, 0, 0].abs().max() < 1e-6


@pytest.mark.parametrize(
    "transform", [Transform((224, 224), 256), Transform((96, 128), (100, 130), "squash", "bicubic", channels="bgr")]
)
def test_dictionary_round_trip_through_json(transform: Transform) -> None:
    written = json.loads(json.dumps(transform.to_dict()))
    assert Transform.from_dict(written) == transform
    assert written["alpha"] == "white"
    assert written["orientation"] == "exif"


def test_other_policies_are_refused() -> None:
    written = Transform((8, 8), 8).to_dict() | {"alpha": "black"}
    with pytest.raises(ValueError, match=r"the stored transform has .*black.*expected .*white"):
        Transform.from_dict(written)


@pytest.mark.parametrize("wrong", [{"resize_mode": "stretch"}, {"channels": "gbr"}, {"interpolation": "best"}])
def test_unknown_names_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Transform((8, 8), (8, 8), **wrong)


def test_squash_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="height, width"):
        Transform((8, 8), 8, "squash")


def test_a_hair_thin_image_is_a_failure_not_a_bomb() -> None:
    with pytest.raises(DecodeError, match="when resized"):
        Transform((224, 224), 256)(Image.new("RGB", (60_000, 1)))


def test_a_strong_view_of_another_recipe_is_refused() -> None:
    """Its recipe is part of its identity, so that a row made by another one is never reused."""
    written = Transform((8, 8), 8, augment="strong", view=1).to_dict()
    assert Transform.from_dict(written).to_dict() == written
    with pytest.raises(ValueError, match="the stored transform has"):
        Transform.from_dict(written | {"strong": "colours"})
    assert "strong" not in Transform((8, 8), 8, augment="standard", view=1).to_dict()


def test_every_change_keeps_size_and_mode() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for change in CHANGES:
        for magnitude in (-1.0, 1.0):
            changed = change(image, magnitude)
            assert (changed.size, changed.mode) == (image.size, "RGB")

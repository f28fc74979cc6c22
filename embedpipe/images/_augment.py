"""Views: seeded random augmentations of an image, which depend on its content, the seed and the view only.

>>> augment(image, "standard", random_of(seed=0, view=1, key=key)).size
(431, 322)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageEnhance, ImageOps

Range = tuple[float, float]
AUGMENTS = ("flip", "standard", "strong")
AREA = (0.35, 1.0)  # share of the image that a random crop keeps
RATIO, ERASED_RATIO = (3 / 4, 4 / 3), (0.3, 3.3)  # width to height of a crop and of an erased part, over the image's
MAGNITUDE, OPERATIONS = 0.3, 2  # of RandAugment: 9 of 30
ERASED, ERASED_AREA = 0.25, (0.02, 0.33)  # probability that a part is erased, and its share of the image
GREY = (124, 116, 104)
RECIPES = {"strong": {"strong": "crop, flip, RandAugment 2 x 9/30, erasing 0.25"}}  # part of the fingerprint


def random_of(*, seed: int, view: int, key: str) -> Random:
    """Return the random number generator of one view of one image.

    Parameters
    ----------
    key : str    sha256 of the image's bytes, hex
    """
    return Random(hashlib.sha256(f"view {seed} {view} {key}".encode()).digest())


def augment(image: Image.Image, name: str, random: Random) -> Image.Image:
    """Return an augmented RGB image.

    Parameters
    ----------
    name : str    "flip": mirrored half of the time; "standard": a random crop too; "strong": then RandAugment and erasing

    Source: Cubuk et al., NeurIPS 2020 (RandAugment); Zhong et al., AAAI 2020 (random erasing).
    """
    if name != "flip":
        image = image.crop(_part(image, random, AREA, RATIO))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if name == "strong":
        for change in random.choices(CHANGES, k=OPERATIONS):
            image = change(image, random.choice((-MAGNITUDE, MAGNITUDE)))
        if random.random() < ERASED:
            image.paste(GREY, _part(image, random, ERASED_AREA, ERASED_RATIO))
    return image


def _part(image: Image.Image, random: Random, share: Range, ratio: Range) -> tuple[int, int, int, int]:
    """Return a random box (left, top, right, bottom) with these ranges of area and aspect ratio, relative to the image's."""
    area = random.uniform(*share) * image.width * image.height
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1]))) * image.width / image.height
    width = min(image.width, max(1, round(math.sqrt(area * aspect))))
    height = min(image.height, max(1, round(math.sqrt(area / aspect))))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    return left, top, left + width, top + height


def _move(image: Image.Image, *matrix: float) -> Image.Image:
    bilinear = Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=GREY)


CHANGES: tuple[Callable[[Image.Image, float], Image.Image], ...] = (  # of an image by a magnitude from -1 to 1
    lambda image, m: image,
    lambda image, m: _move(image, 1, 0.3 * m, 0, 0, 1, 0),
    lambda image, m: _move(image, 1, 0, 0, 0.3 * m, 1, 0),
    lambda image, m: _move(image, 1, 0, 0.45 * m * image.width, 0, 1, 0),
    lambda image, m: _move(image, 1, 0, 0, 0, 1, 0.45 * m * image.height),
    lambda image, m: image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=GREY),
    lambda image, m: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageOps.posterize(image, 8 - round(4 * abs(m))),
    lambda image, m: ImageOps.solarize(image, round(255 * (1 - abs(m)))),
    lambda image, m: ImageOps.autocontrast(image),
    lambda image, m: ImageOps.equalize(image),
)

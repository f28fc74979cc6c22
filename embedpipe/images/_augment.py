"""Views: seeded random changes of an image, the same for the same image, seed and view, in any order and on any machine.

>>> augment(image, "standard", random_of(seed=0, view=1, key=key)).size
(431, 322)
"""

from __future__ import annotations

import hashlib
import math
from random import Random

from PIL import Image, ImageEnhance

AUGMENTS = ("flip", "standard", "strong")
AREA = (0.35, 1.0)  # of the image, that a random crop keeps
RATIO = (3 / 4, 4 / 3)  # width to height of a random crop, relative to the image's
STRENGTH = 0.4  # of changes of brightness, contrast and colour: factors from 1 - 0.4 to 1 + 0.4
GREY = 0.2  # probability of a picture without colours


def random_of(*, seed: int, view: int, key: str) -> Random:
    """Return the random numbers of one view of one image.

    Parameters
    ----------
    key : str    sha256 of the image's bytes, hex
    """
    return Random(hashlib.sha256(f"view {seed} {view} {key}".encode()).digest())


def augment(image: Image.Image, name: str, random: Random) -> Image.Image:
    """Return a changed RGB image.

    Parameters
    ----------
    name : str    "flip": mirrored half of the time; "standard": a random crop too; "strong": other colours as well
    """
    if name != "flip":
        image = _crop(image, random)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _recolour(image, random) if name == "strong" else image


def _crop(image: Image.Image, random: Random) -> Image.Image:
    area = random.uniform(*AREA) * image.width * image.height
    ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1]))) * image.width / image.height
    width = min(image.width, max(1, round(math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(math.sqrt(area / ratio))))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _recolour(image: Image.Image, random: Random) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(random.uniform(1 - STRENGTH, 1 + STRENGTH))
    return image.convert("L").convert("RGB") if random.random() < GREY else image

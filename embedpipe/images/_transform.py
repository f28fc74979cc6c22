"""Transform: from an RGB image to the input tensor of a backbone, reproducibly.

Its pixels are, bit for bit, those of torchvision's `ImageClassification` preset and of timm's
evaluation transform.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from embedpipe.errors import DecodeError
from embedpipe.images._augment import AUGMENTS, RECIPES, augment, random_of
from embedpipe.images._decode import MAX_PIXELS

if TYPE_CHECKING:
    import torch

Resample = Callable[..., np.ndarray | None]
POLICIES = {"pixels": "exact", "orientation": "exif", "alpha": "white", "frame": 0, "scale": "1/255"}


@dataclass(frozen=True)
class Transform:
    """Resize, crop the centre, scale to [0, 1], normalise.

    Parameters
    ----------
    crop_size : (height, width)            of the result, px
    resize_size : int or (height, width)   px; an int is the short side, for mode "short" only
    resize_mode : str                      "short": keep the ratio, cover resize_size;
                                           "squash": exactly resize_size;
                                           "border": keep the ratio, fit into resize_size, pad
                                           with the mean colour
    interpolation : str                    a Pillow filter: nearest, bilinear, bicubic, ...
    mean, std : three floats               of channels in [0, 1], in the order of `channels`
    channels : str                         "rgb" or "bgr", order in the result
    augment, seed, view                    "none", or how `view` 1, 2, ... differs from the clean
                                           image, at random from `seed` and the image's content
    """

    crop_size: tuple[int, int]
    resize_size: int | tuple[int, int]
    resize_mode: str = "short"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: str = "rgb"
    augment: str = "none"
    seed: int = 0
    view: int = 0

    def __post_init__(self) -> None:
        if self.resize_mode not in ("short", "squash", "border") or self.channels not in ("rgb", "bgr"):
            got = f"resize_mode {self.resize_mode!r} and channels {self.channels!r}"
            raise ValueError(f"{got}, expected short, squash or border and rgb or bgr")
        if isinstance(self.resize_size, int) and self.resize_mode != "short":
            raise ValueError(f"resize_size {self.resize_size}, expected (height, width) for {self.resize_mode!r}")
        if self.augment not in ("none", *AUGMENTS) or (self.augment == "none") != (self.view == 0):
            raise ValueError(
                f"view {self.view} by {self.augment!r}, expected view 0 by 'none', or 1 and more by one of {AUGMENTS}"
            )
        if self.interpolation.upper() not in Image.Resampling.__members__:
            raise ValueError(f"interpolation {self.interpolation!r}, expected a Pillow filter such as 'bicubic'")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return float32 (3, height, width) of an RGB image; raises as `window` does."""
        return self.normalise(self.window(image))

    def window(self, image: Image.Image, key: str = "", resample: Resample | None = None) -> np.ndarray:
        """Return the resized and cropped RGB image, uint8 (height, width, 3), red first.

        Parameters
        ----------
        key : str               sha256 of the image's bytes, hex; a view depends on it
        resample : callable     a `Resampler`: the same pixels in less time

        Raises
        ------
        DecodeError    the image is so long and thin that its resized form would be a bomb
        """
        if self.view:
            image = augment(image, self.augment, random_of(seed=self.seed, view=self.view, key=key))
        width, height = size = self._resized(image.width, image.height)
        if width * height > MAX_PIXELS:
            raise DecodeError(f"{image.width} x {image.height} pixels become {width} x {height} when resized")
        box = self._box(width, height)
        if box and resample and size != image.size:
            resized = resample(image, size=size, box=box, interpolation=self.interpolation)
            if resized is not None:
                return resized
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        return np.asarray(self._crop(image))

    def normalise(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return float32 (..., 3, height, width) for outputs of `window`, (..., height, width, 3), on the same device."""
        import torch

        writable = np.require(pixels, requirements="W") if isinstance(pixels, np.ndarray) else pixels
        planes = torch.as_tensor(writable).movedim(-1, -3)
        if self.channels == "bgr":
            planes = planes.flip(-3)
        mean, std = (torch.tensor(values, device=planes.device)[:, None, None] for values in (self.mean, self.std))
        return (planes.float() / 255 - mean) / std

    @property
    def geometry(self) -> Transform:
        """The transform with the same `window`, without normalisation."""
        if self.resize_mode == "border":  # padded with the mean colour
            return self
        return replace(self, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), channels="rgb")

    @property
    def colours(self) -> tuple[Any, ...]:
        """The fields that `normalise` depends on."""
        return self.crop_size, self.mean, self.std, self.channels

    def to_dict(self) -> dict[str, Any]:
        """Return everything that affects a pixel, the fixed policies included; JSON-serialisable."""
        fields = {k: v for k, v in asdict(self).items() if self.view or k not in ("augment", "seed", "view")}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {**lists, **POLICIES, **RECIPES.get(self.augment, {})}

    @cached_property
    def text(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    def describe(self) -> list[str]:
        """Return a description of the steps from an image file to the tensor."""
        height, width = self.crop_size
        size = self.resize_size
        to = {
            "short": f"to {size} px on the short side" if isinstance(size, int) else f"until it covers {_sides(size)}",
            "squash": f"to {_sides(size)}, whatever its ratio",
            "border": f"until it fits into {_sides(size)}, the rest in the mean colour",
        }[self.resize_mode]
        return [
            "decode the first frame, turned upright by its EXIF orientation, as RGB, transparent parts over white",
            f"resize {to}, {self.interpolation} of Pillow (antialiased)",
            f"cut out the centre, {_sides(self.crop_size)}; where the image is smaller, pad",
            f"divide by 255, order as float32 (3, {height}, {width}), {'red' if self.channels == 'rgb' else 'blue'} first",
            f"subtract the mean {list(self.mean)}, divide by the standard deviation {list(self.std)}, channel by channel",
        ]

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Transform:
        """Return the transform that `to_dict` wrote.

        Raises
        ------
        ValueError    it was written with other policies
        """
        written = {"pixels": "exact", **written}
        fixed = {**POLICIES, **RECIPES.get(written.get("augment", "none"), {})}
        differing = {name: written.get(name) for name in fixed if written.get(name) != fixed[name]}
        if differing:
            raise ValueError(f"the stored transform has {differing}, expected { ({n: fixed[n] for n in differing}) }")
        own: dict[str, Any] = {k: v for k, v in written.items() if k not in fixed}
        own |= {k: tuple(v) for k, v in own.items() if isinstance(v, list)}
        return cls(**own)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """Return the crop of the resized image as (left, top, width, height), or None if it has to be padded."""
        crop_height, crop_width = self.crop_size
        if self.resize_mode == "border" or width < crop_width or height < crop_height:
            return None
        return _offset(width, crop_width), _offset(height, crop_height), crop_width, crop_height

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height). torchvision truncates the long side, timm's own resize rounds."""
        if isinstance(self.resize_size, int):
            short, long = sorted((width, height))
            new_long = int(self.resize_size * long / short)
            return (self.resize_size, new_long) if width <= height else (new_long, self.resize_size)
        target_height, target_width = self.resize_size
        if self.resize_mode == "squash":
            return target_width, target_height
        choose = min if self.resize_mode == "short" else max
        ratio = choose(height / target_height, width / target_width)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _crop(self, image: Image.Image) -> Image.Image:
        """Crop the centre; pad where the image is smaller."""
        height, width = self.crop_size
        mean = self.mean if self.channels == "rgb" else self.mean[::-1]
        fill = tuple(round(255 * value) for value in mean) if self.resize_mode == "border" else (0, 0, 0)
        canvas = Image.new("RGB", (width, height), fill)
        canvas.paste(image, (-_offset(image.width, width), -_offset(image.height, height)))
        return canvas


def _sides(size: int | tuple[int, int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} px high and {width} px wide"


def _offset(size: int, crop: int) -> int:
    """Offset of a centred crop, px; negative if the image is smaller than the crop."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2)

"""decode_image: untrusted bytes to an RGB image, the only function that calls a decoder.

Policies, fixed because every feature depends on them: the first frame; EXIF orientation applied, broken
EXIF and ICC profiles ignored; alpha over white; 16-bit samples keep their high byte; CMYK as Pillow
converts it.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import PIL

# Importing a plugin registers its format; no other format is tried.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from embedpipe.errors import DecodeError

DECODER = f"pillow {PIL.__version__}"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_PIXELS = 178_956_970  # what Pillow itself calls a decompression bomb: 512 MiB of RGB
WHITE = (255, 255, 255, 255)
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Errors of decoders are raised; their warnings are not shown.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG, WEBP, BMP, GIF, TIFF or AVIF file into an upright RGB image.

    Parameters
    ----------
    data : bytes    the whole file

    Returns
    -------
    PIL image of mode RGB, loaded

    Raises
    ------
    DecodeError    not an image, or a broken one; the same bytes always give the same reason
    MemoryError    not enough memory on this machine at the moment
    """
    if not data:
        raise DecodeError("empty file", hint="expected an image")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"{image.width} x {image.height} pixels", hint=f"expected at most {MAX_PIXELS}")
            image.load()
            return _to_rgb(_upright(image))
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        raise DecodeError(f"not an image (starts with {data[:8]!r})", hint=f"expected {', '.join(FORMATS)}") from exc
    except Exception as exc:  # decoders raise anything: ValueError, struct.error, IndexError, ...
        reason = " ".join(str(exc).split()) or "no reason given"
        raise DecodeError(f"{type(exc).__name__}: {reason}") from exc


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # noqa: BLE001  a broken EXIF block is ignored
        return image
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no fixed scale", hint="expected 1, 8 or 16 bits a channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer)
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, as Pillow does for 16-bit colour."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise DecodeError("32-bit pixels have no fixed scale", hint="expected 1, 8 or 16 bits a channel")
    return Image.fromarray((pixels >> 8).astype(np.uint8))

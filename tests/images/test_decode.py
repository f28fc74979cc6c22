"""Formats and modes end as upright RGB, broken files as a DecodeError with a stable reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embedpipe.errors import DecodeError
from embedpipe.images import DECODER, decode_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def colour(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return tuple(image.getpixel(at))


def near(found: tuple[int, ...], expected: tuple[int, ...], tolerance: int = 4) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_every_format(name: str) -> None:
    image = Image.new("RGB", (32, 16), RED)
    data = encode(image, name)
    assert decode_image(data).size == (32, 16)
    assert near(colour(data), RED)


@pytest.mark.parametrize("name", ["PPM", "ICO", "PCX", "TGA"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(DecodeError, match="not an image"):
        decode_image(encode(Image.new("RGB", (16, 16), RED), name))


UPRIGHT = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a)),
        (7, lambda a: a[::-1, ::-1].T),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_orientation(orientation: int, stored, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(stored(np.asarray(UPRIGHT)))
    image = decode_image(encode(Image.fromarray(pixels), name, exif=exif))
    assert np.array_equal(np.asarray(image)[..., 0], np.asarray(UPRIGHT))


def test_broken_exif_is_as_none() -> None:
    data = encode(Image.new("RGB", (8, 8), RED), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert colour(data) == RED


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert near(colour(encode(half, "PNG")), (255, 127, 127), 1)
    assert colour(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP", lossless=True)) == WHITE
    assert colour(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")) == WHITE


def test_palettes() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 255, 0])
    assert colour(encode(image, "PNG")) == GREEN
    assert colour(encode(image, "PNG", transparency=1)) == WHITE
    assert colour(encode(image, "PNG", transparency=0)) == GREEN
    assert colour(encode(image, "GIF", transparency=1)) == WHITE


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(name: str) -> None:
    pixels = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    image = decode_image(encode(Image.fromarray(pixels), name))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 127, 255]


def test_big_endian_sixteen_bits() -> None:
    little = encode(Image.fromarray(np.full((2, 2), 0x1234, np.uint16)), "TIFF")
    big = Image.frombytes("I;16B", (2, 2), b"\x12\x34" * 4)
    assert colour(encode(big, "TIFF")) == colour(little) == (0x12,) * 3


def test_sixteen_bit_colour_agrees_with_sixteen_bit_grey() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + struct.pack(">HHH", 0x12FF, 0x7F80, 0xFFFF))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert colour(png) == (0x12, 0x7F, 0xFF)


def test_grey_bilevel_and_cmyk() -> None:
    assert colour(encode(Image.new("L", (4, 4), 99), "PNG")) == (99,) * 3
    assert colour(encode(Image.new("1", (4, 4), 1), "PNG")) == WHITE
    assert near(colour(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), RED)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.full((2, 2), 70_000, np.int32)])
def test_pixels_without_a_scale_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DecodeError, match="no fixed scale"):
        decode_image(encode(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("name", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame(name: str) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    data = encode(first, name, save_all=True, append_images=[second])
    assert near(colour(data), RED)


def test_empty_and_foreign_bytes() -> None:
    with pytest.raises(DecodeError, match="empty file"):
        decode_image(b"")
    reasons = set()
    for _ in range(2):
        with pytest.raises(DecodeError, match="not an image") as caught:
            decode_image(b"plain text, no image")
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x7" not in reasons.pop()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF"])
def test_truncated_files_are_errors(name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encode(Image.fromarray(pixels), name)
    with pytest.raises(DecodeError):
        decode_image(data[: len(data) // 2])


def test_a_bomb_is_refused_even_where_the_host_lifted_the_limit_of_pillow(monkeypatch) -> None:
    data = encode(Image.new("1", (16_000, 12_000)), "PNG")
    assert len(data) < 100_000
    with pytest.raises(DecodeError, match="exceeds limit"):
        decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DecodeError, match="expected at most"):
        decode_image(data)


GOOD = [
    encode(Image.effect_noise((24, 24), 60).convert("RGB"), name)
    for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP")
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255))))
def test_damaged_bytes_give_an_image_or_a_decode_error(good: bytes, damage: list[tuple[int, int]]) -> None:
    data = bytearray(good)
    for at, value in damage:
        data[at % len(data)] = value
    try:
        image = decode_image(bytes(data))
    except DecodeError:
        return
    assert image.mode == "RGB"


def test_decoder_names_library_and_version() -> None:
    name, version = DECODER.split(" ")
    assert name == "pillow"
    assert version[0].isdigit()


def test_torch_is_not_imported_with_the_room() -> None:
    code = "import sys, embedpipe.images, embedpipe.data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""A folder of broken and odd images, one for each good one: every bad file is reported, no good row is touched."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from embedpipe.cache import Cache
from tests.conftest import TINY, Run

BATCH = ["--batch-size", 8]


def pixels(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """Return a PNG that says it is of some size, with whatever data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def broken() -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of files that no decoder may take."""
    for kind, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
    ):
        whole = encoded(pixels(1, (24, 24)), kind)
        for cut in range(64, len(whole) - 64, 64):
            yield b"cut-%s-%05d.%s" % (kind.encode(), cut, suffix.encode()), whole[:cut]
    avif = encoded(pixels(1, (64, 64)), "AVIF")
    for cut in range(64, len(avif) - 64, 64):
        yield b"cut-AVIF-%05d.avif" % cut, avif[:cut]
    yield b"zero.png", b""
    yield b"text.jpg", b"this is no image at all\n" * 9
    yield b"script.png", b"#!/bin/sh\ntouch /tmp/owned\n"
    yield b"postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield b"bomb.png", png_of(50_000, 50_000, data=zlib.compress(bytes(10_000_000)))
    yield b"wide-bomb.png", png_of(2**31 - 1, 1, data=zlib.compress(b"\0"))
    yield b"empty-size.png", png_of(0, 0)
    yield b"thin.png", encoded(Image.new("RGB", (150_000, 1)), "PNG")
    yield b"float.tif", encoded(Image.new("F", (9, 9)), "TIFF")
    yield b"int32.tif", encoded(Image.fromarray(np.full((9, 9), 1 << 20, np.int32)), "TIFF")
    yield b"not utf-8 \xff\xfe.jpg", b"broken too"
    yield b"new\nline.png", b"broken"
    for seed in range(20):
        yield b"noise-%02d.jpg" % seed, b"\xff\xd8\xff" + np.random.default_rng(seed).bytes(500)


def odd() -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of unusual images that are sound."""
    base = pixels(2)
    yield b"really-a-png.jpg", encoded(base, "PNG")
    yield b"really-a-jpeg.png", encoded(base, "JPEG")
    yield b"cmyk.jpg", encoded(base.convert("CMYK"), "JPEG")
    yield b"grey.png", encoded(base.convert("L"), "PNG")
    yield b"grey-alpha.png", encoded(base.convert("LA"), "PNG")
    yield b"alpha.png", encoded(base.convert("RGBA"), "PNG")
    yield b"palette.png", encoded(base.convert("P"), "PNG")
    yield b"bilevel.tif", encoded(base.convert("1"), "TIFF")
    yield b"grey16.png", encoded(Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48) * 30), "PNG")
    frames = [pixels(seed) for seed in range(3, 6)]
    yield b"animated.gif", encoded(base, "GIF", save_all=True, append_images=frames)
    yield b"animated.webp", encoded(base, "WEBP", save_all=True, append_images=frames)
    yield b"pages.tif", encoded(base, "TIFF", save_all=True, append_images=frames)
    yield b"one-pixel.png", encoded(base.crop((0, 0, 1, 1)), "PNG")
    yield b"line.png", encoded(base.crop((0, 0, 1, 40)), "PNG")
    yield b"caf\xe9.png", encoded(pixels(6), "PNG")
    yield b"a\nline.png", encoded(pixels(7), "PNG")
    yield b"  spaces  .png", encoded(pixels(8), "PNG")
    yield b"-dash.png", encoded(pixels(9), "PNG")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield b"exif-%d.jpg" % orientation, encoded(pixels(10), "JPEG", exif=exif)
    yield b"broken-exif.jpg", encoded(pixels(11), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)


def write(folder: Path, files: Iterator[tuple[bytes, bytes]]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files:
        paths.append(folder / os.fsdecode(name))
        paths[-1].write_bytes(content)
    return paths


def rows_of(folder: Path = Path("cache")) -> dict[bytes, bytes]:
    [space] = Cache(folder).spaces()
    view = space.view()
    keys = [key.tobytes() for key in view.keys]
    return {key: row.tobytes() for key, row in zip(keys, view.read(keys), strict=True)}


def sound(count: int) -> Iterator[tuple[bytes, bytes]]:
    for seed in range(count):
        yield b"good-%04d.png" % seed, encoded(pixels(1000 + seed), "PNG")


def unreadable(folder: Path) -> list[Path]:
    """Make what cannot even be read: a loop of links, a link to nothing."""
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "nothing.png").symlink_to(folder / "no such file")
    return [folder / "loop.png", folder / "nothing.png"]


def test_a_corpus_of_broken_and_odd_images(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    bad = write(data / "mixed", broken())
    good = write(data / "mixed", sound(len(bad))) + write(data / "odd", odd())
    bad += unreadable(data / "mixed")
    os.mkfifo(data / "mixed" / "pipe.png")  # not a candidate: a reader would wait for ever
    done = run("extract", data / "mixed", data / "odd", *TINY, *BATCH, "--quiet", "--json")
    assert done.code == 3
    failed = {failure["path"]: failure for failure in done.data["failed"]}
    assert set(failed) == {str(path) for path in bad}
    assert all(failure["reason"].strip() and "\n" not in failure["reason"] for failure in failed.values())
    stages = {path: failure["stage"] for path, failure in failed.items()}
    assert {stage for path, stage in stages.items() if "loop" in path or "nothing" in path} == {"read"}
    assert {stage for path, stage in stages.items() if "loop" not in path and "nothing" not in path} == {"decode"}
    assert done.data["computed"] == len(rows_of())
    assert not Path("/tmp/owned").exists()

    for path in bad:
        path.unlink()
    alone = run("extract", data / "mixed", data / "odd", *TINY, *BATCH, "--cache-dir", "alone", "--quiet", "--json")
    assert alone.code == 0
    assert alone.data["images"] == len(good)
    assert rows_of(Path("alone")) == rows_of()


def test_what_failed_is_remembered_tried_again_on_demand_and_refused_when_strict(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "data", sound(4))
    [torn] = write(tmp_path / "data", iter([(b"torn.png", encoded(pixels(1), "PNG")[:200])]))
    first = run("extract", tmp_path / "data", *TINY, "--json")
    again = run("extract", tmp_path / "data", *TINY, "--json")
    retried = run("extract", tmp_path / "data", *TINY, "--retry-failed", "--json")
    assert first.code == again.code == retried.code == 3
    assert first.data["failed"] == again.data["failed"] == retried.data["failed"]
    [space] = Cache(Path("cache")).spaces()
    assert [stage for stage, _, _ in space.view().failures.values()] == ["decode"]
    assert run("extract", tmp_path / "data", *TINY, "--strict").code == 1
    torn.write_bytes(encoded(pixels(1), "PNG"))
    mended = run("extract", tmp_path / "data", *TINY, "--json")
    assert (mended.code, mended.data["computed"]) == (0, 1)

"""Crafted files with a valid seal: links to other files, and shapes larger than the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from embedpipe.cache import Space
from embedpipe.cache._sealed import seal
from embedpipe.errors import CacheMismatch

from .conftest import rows, write

KEYS, X = rows(4)
Craft = Callable[[h5py.File, Path], None]


def replace(file: h5py.File, name: str, **options: object) -> None:
    del file[name]
    file.create_dataset(name, **options)


def plain(file: h5py.File, outside: Path) -> None:
    pass


def external(file: h5py.File, outside: Path) -> None:
    stored = [(str(outside), 0, h5py.h5f.UNLIMITED)]
    replace(file, "keys", shape=(4, 32), dtype="u1", external=stored)


def virtual(file: h5py.File, outside: Path) -> None:
    del file["keys"]
    layout = h5py.VirtualLayout(shape=(4, 32), dtype="u1")
    layout[:] = h5py.VirtualSource(str(outside), "keys", shape=(4, 32))
    file.create_virtual_dataset("keys", layout)


def soft_link(file: h5py.File, outside: Path) -> None:
    del file["failed/stage"]
    file["failed/stage"] = h5py.SoftLink("/failed/reason")


def external_link(file: h5py.File, outside: Path) -> None:
    del file["keys"]
    file["keys"] = h5py.ExternalLink(str(outside), "/keys")


def filtered(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.zeros((4, 32), np.uint8), chunks=(4, 32), compression="gzip")


def shape_bomb(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", shape=(1 << 40, 32), dtype="u1", chunks=(1, 32))


def late_bomb(file: h5py.File, outside: Path) -> None:
    replace(file, "blocks", shape=(1 << 40, 32), dtype="u1")


def other_type(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.zeros((4, 32), "<f4"))


def big_endian(file: h5py.File, outside: Path) -> None:
    file["features"] = X.astype(">f4")


def missing(file: h5py.File, outside: Path) -> None:
    del file["failed/reason"]


def additional(file: h5py.File, outside: Path) -> None:
    file["more"] = np.zeros(3)


def group_cycle(file: h5py.File, outside: Path) -> None:
    file["failed/failed"] = file["failed"]


def null_array(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=h5py.Empty("u1"))


def fewer_keys(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.zeros((3, 32), np.uint8))


def uneven_failures(file: h5py.File, outside: Path) -> None:
    replace(file, "failed/keys", data=np.zeros((70, 32), np.uint8))


def text_attribute(file: h5py.File, outside: Path) -> None:
    file.attrs["spec"] = "variable length"


CRAFTS: list[tuple[Craft, str]] = [
    (external, "virtual, external"),
    (virtual, "virtual, external"),
    (soft_link, "is a soft or external link"),
    (external_link, "is a soft or external link"),
    (filtered, "chunked, filtered"),
    (shape_bomb, "chunked, filtered"),
    (late_bomb, "but 0 bytes are stored"),
    (other_type, "expected u1"),
    (big_endian, "expected f4"),
    (missing, "it holds"),
    (additional, "it holds"),
    (group_cycle, "is not an array"),
    (null_array, "null"),
    (fewer_keys, "do not fit together"),
    (uneven_failures, "do not fit together"),
    (text_attribute, "the attribute spec"),
]


def forge(space: Space, craft: Craft, outside: Path) -> None:
    """Replace features.h5 by a file that plain h5py wrote, with a valid seal."""
    write(space, KEYS, X)
    forged = outside.with_suffix(".forged")
    layout = {"userblock_size": 512, "alignment_threshold": 1, "alignment_interval": 64}
    with h5py.File(space.features_path) as real, h5py.File(forged, "w", libver="earliest", **layout) as file:
        for name, value in real.attrs.items():
            file.attrs[name] = value
        for name in ("keys", "blocks", "failed"):
            real.copy(name, file)
        craft(file, outside)
        if "features" not in file:
            real.copy("features", file)
    raw = forged.read_bytes()
    space.features_path.write_bytes(seal(raw[: -X.nbytes], X.nbytes) + raw[-X.nbytes :])


@pytest.mark.parametrize(("craft", "reason"), CRAFTS)
def test_a_crafted_file_is_refused(space: Space, tmp_path: Path, craft: Craft, reason: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret" * 100)
    forge(space, craft, outside)
    with pytest.raises(CacheMismatch, match=reason) as caught:
        space.view()
    assert "secret" not in str(caught.value)


def test_the_unchanged_forgery_is_accepted(space: Space, tmp_path: Path) -> None:
    forge(space, plain, tmp_path / "outside")
    assert (space.view().read(KEYS) == X).all()


def test_a_newer_format_is_refused(space: Space) -> None:
    write(space, KEYS, X)
    for path in (space.features_path, space.folder / "meta.json"):
        raw = path.read_bytes()
        newer = raw.replace(b'"format_version":1', b'"format_version":2')
        newer = newer.replace(b'"format_version": 1', b'"format_version": 2')
        path.write_bytes(newer)
        with pytest.raises(CacheMismatch, match="format version 2"):
            space.view()
        path.write_bytes(raw)
    assert json.loads(raw)["format_version"] == 1


@pytest.mark.parametrize("block", [b"", b"null", b"[]", b"9" * 400, b"[" * 512, b'{"data":[0]}'])
def test_a_foreign_file_is_refused(space: Space, block: bytes) -> None:
    write(space, KEYS, X)
    raw = space.features_path.read_bytes()
    space.features_path.write_bytes(block.ljust(512) + raw[512:])
    with pytest.raises(CacheMismatch):
        space.view()


def test_links_in_the_folder_are_refused(space: Space, tmp_path: Path) -> None:
    write(space, KEYS, X)
    moved = space.features_path.rename(tmp_path / "moved.h5")
    space.features_path.symlink_to(moved)
    with pytest.raises(CacheMismatch, match="symbolic link"):
        space.view()

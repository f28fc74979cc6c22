"""Verification finds and names damage in any part of a space, and none in an intact space."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedpipe.cache import Cache, Space, verify_files, verify_latest, verify_space
from embedpipe.cache._features import key_matrix, write_features
from embedpipe.cache._sealed import USER_BLOCK, seal
from embedpipe.data import ByteSource, Manifest, Sample, Source

from .conftest import rows, write

KEYS, X = rows(300, 1024)


@pytest.fixture
def filled(space: Space) -> Space:
    """A base of 290 rows and a shard of 10."""
    write(space, KEYS[:290], X[:290])
    with space.writer(feature_dim=1024, dtype="float32", environment={}, pins={}) as writer:
        writer.append(KEYS[290:], X[290:])
    return space


def details(cache: Cache, space: Space) -> list[str]:
    return [finding.detail for finding in verify_space(cache, space.folder.name)]


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def rewrite(space: Space, keys: list[bytes], features: np.ndarray) -> None:
    """Replace the base by a valid file with these values."""
    assert space.meta is not None
    meta = replace(space.meta, feature_dim=features.shape[1])
    with space.features_path.open("wb") as stream:
        write_features(stream, meta, key_matrix(keys), [features], {})


def test_an_intact_space_has_no_damage(cache: Cache, filled: Space) -> None:
    assert details(cache, filled) == []


def test_each_changed_mib_is_named(cache: Cache, filled: Space) -> None:
    size = filled.features_path.stat().st_size
    flip(filled.features_path, size - 1)
    flip(filled.features_path, size - X[:290].nbytes)
    flip(filled.shard_paths()[0], -1)
    found = details(cache, filled)
    assert sum("MiB 0 of its features" in text for text in found) == 2
    assert sum("MiB 1 of its features" in text for text in found) == 1


def test_keys_are_checked_apart_from_the_seal(cache: Cache, filled: Space) -> None:
    raw = filled.features_path.read_bytes()
    head = bytearray(raw[: len(raw) - X[:290].nbytes])
    head[head.index(min(KEYS[:290]))] ^= 1
    head[:USER_BLOCK] = bytes(USER_BLOCK)
    filled.features_path.write_bytes(seal(bytes(head), X[:290].nbytes) + raw[len(head) :])
    assert details(cache, filled) == ["its keys have changed"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(cache: Cache, filled: Space, value: float) -> None:
    bad = X[:290].copy()
    bad[137, 5] = value
    rewrite(filled, KEYS[:290], bad)
    assert details(cache, filled) == ["row 137 has NaN or infinity"]


def test_rows_of_another_width_are_found(cache: Cache, filled: Space) -> None:
    rewrite(filled, KEYS[:10], X[:10, :7].copy())
    assert "it has 7 x float32 a row, expected 1024 x float32" in details(cache, filled)


def test_a_lost_record_of_a_space_is_damage(cache: Cache, filled: Space) -> None:
    (filled.folder / "meta.json").unlink()
    assert cache.space_names() == [filled.folder.name]
    assert details(cache, filled) == [f"{filled.folder} is damaged or foreign: its name does not fit its spec"]


def test_latest_names_what_is_there(cache: Cache, filled: Space) -> None:
    cache.table_path("data-0").parent.mkdir()
    cache.table_path("data-0").touch()
    cache.set_latest("data-0", [filled.folder.name])
    latest = cache.root / "latest.json"
    raw = latest.read_bytes()
    assert list(verify_latest(cache)) == []
    for place in range(len(raw)):
        flip(latest, place)
        assert list(verify_latest(cache)), raw[:place]
        latest.write_bytes(raw[:place])
        assert list(verify_latest(cache)), raw[:place]
        latest.write_bytes(raw)


def test_files_are_read_again_whatever_their_times_say(tmp_path: Path) -> None:
    import hashlib
    import os

    paths = [tmp_path / name for name in ("same", "changed", "gone", "pipe")]
    for path in paths[:3]:
        path.write_text(path.name)
    keys = [hashlib.sha256(path.name.encode()).digest() for path in paths]
    times = paths[1].stat()
    paths[1].write_text("CHANGED")
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    paths[2].unlink()
    os.mkfifo(paths[3])
    samples = tuple(Sample(p.name, None, "all", None, key) for p, key in zip(paths, keys, strict=True))
    files, findings = verify_files(Manifest("x", (Source("x", tmp_path),), samples, (), 0, (), ()))
    assert files == {keys[0]: ByteSource.from_path(paths[0])}
    assert [(f.kind, Path(f.place).name) for f in findings] == [
        ("changed", "changed"),
        ("unreadable", "gone"),
        ("unreadable", "pipe"),
    ]

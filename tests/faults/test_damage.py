"""Flipped bits and truncation anywhere in any file of a cache: each is detected, and no reader returns a wrong value."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedpipe.cache import Cache, Space
from embedpipe.commands.verify import verify_cache
from embedpipe.data import Manifest, Sample, Source
from embedpipe.errors import CacheMismatch

from ._proving import SPEC, features_of, keys_of
from ._tier import tier

FLIPS, CUTS = tier(70, 500), tier(30, 200)
DIM = 1024
KEYS = keys_of(range(300))  # 1.2 MiB of features: two blocks
FAILURES = dict.fromkeys(keys_of(range(300, 340)), ("decode", "not an image", "pillow 13"))
Fact = tuple[str, Callable[[], Any]]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A base file, two shards, failures, two sample tables and the record of the latest extraction."""
    cache = Cache(tmp_path / "cache")
    space = cache.open_space(SPEC)
    options = {"feature_dim": DIM, "dtype": "float32", "environment": {"torch": "2"}, "pins": {"batch_size": 32}}
    with space.writer(**options) as writer:  # type: ignore[arg-type]
        writer.append(KEYS[:280], features_of(KEYS[:280], DIM))
        writer.finish()
    with space.writer(**options) as writer:  # type: ignore[arg-type]
        writer.append(KEYS[280:290], features_of(KEYS[280:290], DIM))
        writer.commit()
        writer.append(KEYS[290:], features_of(KEYS[290:], DIM))
        for key, record in FAILURES.items():
            writer.fail(key, *record)
    for name in ("photos", "more"):
        cache.write_dataset(table_of(name))
    cache.set_latest(cache.datasets()[0], [space.folder.name])
    return cache


def table_of(name: str) -> Manifest:
    samples = tuple(Sample(f"{i % 3}/{i}.png", f"{i % 3}", "train", f"group {i}", key) for i, key in enumerate(KEYS))
    source = Source(f"/data/{name}", Path("/data") / name)
    return Manifest(name, (source,), samples, ("0", "1", "2"), 3, (), ("odd",))


def facts_of(cache: Cache, space: Space) -> Iterator[Fact]:
    """Yield all that readers can say of a cache, each as a question."""
    yield "latest", cache.latest
    for name in cache.datasets():
        yield name, lambda name=name: cache.read_dataset(name)
    yield "environments", lambda: (space.environments, space.interrupted, space.feature_dim, space.loader, space.meta)
    yield "spaces", lambda: [(one.folder, one.spec) for one in cache.spaces()]
    yield "keys", lambda: space.view().keys.tobytes()
    yield "failures", lambda: space.view().failures
    for number in range(0, len(KEYS), 75):
        keys = KEYS[number : number + 75]
        yield f"rows {number}", lambda keys=keys: space.view().read(keys).tobytes()


def prove(cache: Cache, space: Space) -> None:
    """Ask for everything; the first thing that is not as it was written raises."""
    for _, ask in facts_of(cache, space):
        ask()


def damages(files: list[Path], chance: random.Random) -> Iterator[tuple[Path, bytes]]:
    """Yield files with one bit flipped, half of them in the first 4 KiB, then files cut short."""
    for _ in range(FLIPS):
        path = chance.choice(files)
        raw = bytearray(path.read_bytes())
        place = chance.randrange(chance.choice([len(raw), min(len(raw), 4096)]))
        raw[place] ^= 1 << chance.randrange(8)
        yield path, bytes(raw)
    for _ in range(CUTS):
        path = chance.choice(files)
        raw = path.read_bytes()  # type: ignore[assignment]
        yield path, bytes(raw[: chance.choice([chance.randrange(len(raw)), len(raw) - 1 - chance.randrange(9)])])


@pytest.mark.timeout(600)
def test_every_damage_is_found_and_none_is_served(cache: Cache) -> None:
    (space,) = cache.spaces()
    files = sorted(path for path in cache.root.rglob("*") if path.is_file() and path.name != ".lock")
    assert len(files) == 1 + 2 + 2 + 1 + 1
    truth = {name: ask() for name, ask in facts_of(cache, space)}
    assert truth["rows 225"] == features_of(KEYS[225:], DIM).tobytes()
    assert truth["failures"] == FAILURES
    assert not verify_cache(sample=0, cache_dir=cache.root).damaged
    served = missed = 0
    for path, damage in damages(files, random.Random(0)):
        intact = path.read_bytes()
        path.write_bytes(damage)
        try:
            with pytest.raises(CacheMismatch):
                prove(cache, space)
        except pytest.fail.Exception:
            missed += 1
            print(f"not found: {path.name}: {intact[:200]!r} became {damage[:200]!r}")
        if not verify_cache(sample=0, cache_dir=cache.root).damaged:
            missed += 1
            print(f"not found by verify: {path.name}: {intact[:200]!r} became {damage[:200]!r}")
        for name, ask in facts_of(cache, space):
            try:
                served += ask() != truth[name]
            except CacheMismatch:
                continue
        path.write_bytes(intact)
    prove(cache, space)
    assert (missed, served) == (0, 0), f"of {FLIPS} flips and {CUTS} cuts {missed} missed, {served} answers wrong"

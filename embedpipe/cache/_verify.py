"""The cache proves itself: every byte of every file against its digests, every key against the file it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from embedpipe.cache._cache import Cache
from embedpipe.cache._features import FeatureFile
from embedpipe.cache._index import KeyIndex
from embedpipe.data import Manifest, Place
from embedpipe.errors import CacheMismatch

DAMAGE = "damage"


@dataclass(frozen=True)
class Finding:
    """One thing that verifying found.

    kind : str      "damage" of the cache; all others are information: "unreadable" or "changed" image files, "missing" or
                    "orphaned" rows, "unproved" rows that could not be recomputed
    place : str     a file, a space or a data set
    detail : str    one line
    """

    kind: str
    place: str
    detail: str


def prove_space(cache: Cache, name: str) -> Iterator[Finding]:
    """Yield the damage of a space: meta.json, and every byte and value of the base and of the shards."""
    folder = cache.spaces_folder / name
    try:
        space = cache.find_space(name)
    except CacheMismatch as exc:
        yield Finding(DAMAGE, str(folder), exc.message)
        return
    width = (space.feature_dim, space.dtype)
    for path in (*space.shard_paths(), space.features_path):
        try:
            file = FeatureFile(path, space.fingerprint)
            flaws = list(file.flaws())
        except FileNotFoundError:
            continue  # merged meanwhile, or no base yet
        except CacheMismatch as exc:
            flaws = [exc.message]
        else:
            if (file.shape[1], file.dtype.name) != width:
                flaws.append(f"it has {file.shape[1]} x {file.dtype} a row, expected {width[0]} x {width[1]}")
        yield from (Finding(DAMAGE, str(path), flaw) for flaw in flaws)


def prove_latest(cache: Cache) -> Iterator[Finding]:
    """Yield the damage of latest.json, names of what is not there included."""
    place = str(cache.root / "latest.json")
    try:
        latest = cache.latest() or {"dataset": "", "spaces": []}
    except CacheMismatch as exc:
        yield Finding(DAMAGE, place, exc.message)
        return
    names = {*cache.datasets(), *cache.space_names(), ""}
    for name in (latest["dataset"], *latest["spaces"]):
        if name not in names:
            yield Finding(DAMAGE, place, f"it names {name}, which is not in the cache")


def prove_files(manifest: Manifest) -> tuple[dict[bytes, Place], list[Finding]]:
    """Read every image file of a data set again.

    Returns
    -------
    dict of key to place   of the files that still have the bytes that they were extracted from
    list of Finding        "unreadable" and "changed" files
    """
    files: dict[bytes, Place] = {}
    findings = []
    with closing(KeyIndex(Path(":memory:"))) as index:  # no memo: every file is read
        for sample in manifest.samples:
            place = manifest.place_of(sample)
            try:
                if index.key_of(place) == sample.key:
                    files[sample.key] = place
                else:
                    findings.append(Finding("changed", str(place), "it has other bytes than those that were extracted"))
            except OSError as exc:
                findings.append(Finding("unreadable", str(place), exc.strerror or str(exc)))
    return files, findings

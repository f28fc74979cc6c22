"""Verification of a cache: every byte against its checksum, and every key against its image file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from embedpipe.cache._cache import Cache
from embedpipe.cache._features import FeatureFile
from embedpipe.cache._index import KeyIndex
from embedpipe.data import ByteSource, Manifest
from embedpipe.errors import CacheMismatch

DAMAGE = "damage"


@dataclass(frozen=True)
class Finding:
    """One finding of a verification.

    kind : str      "damage" of the cache; all other kinds are informative: "unreadable" or "changed" image files,
                    "missing" or "orphaned" rows, "unproved" rows that could not be computed again, "unsupported" spaces
    place : str     a file, a space or a data set
    detail : str    one line
    """

    kind: str
    place: str
    detail: str


def verify_space(cache: Cache, name: str) -> Iterator[Finding]:
    """Check meta.json, and every byte and value of the base and the shards; yield the damage.

    The rows of an unsupported space cannot be checked: the only finding says that it is not supported.
    """
    folder = cache.spaces_folder / name
    try:
        space = cache.find_space(name)
    except CacheMismatch as exc:
        yield Finding(DAMAGE, str(folder), exc.message)
        return
    if space.unsupported:
        yield Finding("unsupported", str(folder), space.unsupported)
        return
    meta = space.meta
    assert meta is not None
    for path in (*space.shard_paths(), space.features_path):
        try:
            damage = list(FeatureFile(path, space.fingerprint).find_damage(meta))
        except FileNotFoundError:
            continue  # merged meanwhile, or no base yet
        except CacheMismatch as exc:
            damage = [exc.message]
        yield from (Finding(DAMAGE, str(path), detail) for detail in damage)


def verify_latest(cache: Cache) -> Iterator[Finding]:
    """Check latest.json, and that the data set and spaces in it exist; yield the damage."""
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


def verify_files(manifest: Manifest) -> tuple[dict[bytes, ByteSource], list[Finding]]:
    """Read every image file of a data set again, and compare its sha256 with its key.

    Returns
    -------
    dict of key to place    of the files whose bytes have not changed since the extraction
    list of Finding         "unreadable" and "changed" files
    """
    files: dict[bytes, ByteSource] = {}
    findings = []
    with closing(KeyIndex(Path(":memory:"))) as index:  # an empty memo: every file is read
        for sample in manifest.samples:
            place = manifest.byte_source_of(sample)
            try:
                if index.key_of(place) == sample.key:
                    files[sample.key] = place
                else:
                    findings.append(Finding("changed", str(place), "its bytes have changed since the extraction"))
            except OSError as exc:
                findings.append(Finding("unreadable", str(place), exc.strerror or str(exc)))
    return files, findings

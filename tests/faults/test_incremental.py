"""A changed data set costs its changed images; an unchanged one costs a `stat` a file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedpipe.cache import Cache, KeyIndex
from embedpipe.data import read_manifest
from tests.conftest import TINY, Run

from ._tracing import looked_at, opened, trace

CLASSES = ("blue", "green", "red")
SETTLED_S = 2.1  # files younger than 2 s may change again within a tick of their clock
OPENS: Counter[str] = Counter()
WATCHED: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHED and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if path.startswith(WATCHED[0]):
            OPENS[path] += 1


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    sys.addaudithook(_watch)  # stays for the life of the process, and looks only while something is watched


@pytest.fixture
def opens(tmp_path: Path) -> Iterator[Counter[str]]:
    """How often Python opened each file of the data folder."""
    WATCHED.append(str(tmp_path / "photos"))
    OPENS.clear()
    yield OPENS
    WATCHED.clear()


def write_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_images(folder: Path, count: int) -> list[Path]:
    paths = [write_image(folder / CLASSES[i % 3] / f"{i:04d}.png", i) for i in range(count)]
    time.sleep(SETTLED_S)
    return paths


def change(folder: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """Add, delete, rename, edit, relabel and duplicate ten images each; return what was touched."""
    tens = [paths[start : start + 10] for start in range(0, 50, 10)]
    deleted, renamed, edited, relabelled, duplicated = tens
    for number in range(10):
        write_image(folder / CLASSES[number % 3] / f"new-{number}.png", 5000 + number)
        deleted[number].unlink()
        renamed[number].rename(renamed[number].with_name(f"renamed-{number}.png"))
        write_image(edited[number], 6000 + number)
        other = folder / CLASSES[(CLASSES.index(relabelled[number].parent.name) + 1) % 3]
        relabelled[number].rename(other / relabelled[number].name)
        shutil.copy(duplicated[number], duplicated[number].with_name(f"copy-{number}.png"))
    return {"deleted": deleted, "edited": edited}


@pytest.mark.timeout(300)
def test_exactly_the_changed_images_are_computed(tmp_path: Path, run: Run, opens: Counter[str]) -> None:
    folder = tmp_path / "photos"
    paths = write_images(folder, 1000)

    def extract(*flags: object) -> dict[str, Any]:
        opens.clear()
        ended = run("extract", folder, *TINY, "--image-size", 32, *flags, "--json")
        assert ended.code == 0, ended.err
        return ended.data

    before_keys = {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}
    first = extract()
    assert (first["computed"], first["rows"]) == (1000, 1000)
    space = Cache(tmp_path / "work" / "cache").find_space(Path(first["space"]).name)
    rows = space.view().read(before_keys.values())

    again = extract()
    assert (again["computed"], again["reused"]) == (0, 1000)
    assert not opens, "an unchanged file was opened"

    touched = change(folder, paths)
    changed = extract()
    assert (changed["computed"], changed["rows"], changed["images"]) == (20, 1020, 1010)
    assert changed["reused"] == 1010 - 20 - 10  # ten are there twice
    # added, renamed, edited, moved, copied: hashed, and opened once more by a decoder, elsewhere; the rest: never opened
    assert len(opens) == sum(opens.values()) == 5 * 10
    assert (space.view().read(before_keys.values()) == rows).all()
    assert not [path for path in touched["deleted"] if str(path) in opens]

    time.sleep(SETTLED_S)
    for flags in ((), ("--val-fraction", 0.4), ("--split-by", "hash", "--test-fraction", 0.3), ("--limit", 500)):
        assert extract(*flags)["computed"] == 0
    for path in list(folder.glob("*/*")):
        place = folder / ("train" if int(path.stat().st_ino) % 3 else "test") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / path.name)
    for name in CLASSES:
        (folder / name).rmdir()
    split = extract()
    assert (split["computed"], set(split["splits"])) == (0, {"train", "val", "test"})
    assert (space.view().read(before_keys.values()) == rows).all()


Scan = Callable[[], int]


@pytest.fixture
def hashed(tmp_path: Path) -> Scan:
    """Read the manifest as a new process would; return how many files were read for it."""

    def scan() -> int:
        index = KeyIndex()
        read_manifest([tmp_path / "photos"], key_of=index.key_of)
        index.close()
        return index.hashed

    return scan


def test_only_young_or_changed_files_are_hashed_again(tmp_path: Path, hashed: Scan) -> None:
    paths = write_images(tmp_path / "photos", 30)
    assert [hashed(), hashed()] == [30, 0]
    write_image(paths[0], 999)
    assert [hashed(), hashed()] == [1, 1]  # so young that it may change again unseen
    time.sleep(SETTLED_S)
    assert [hashed(), hashed()] == [1, 0]
    status = paths[1].stat()
    data = bytearray(paths[1].read_bytes())
    data[-1] ^= 1
    paths[1].write_bytes(data)
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same mtime
    assert hashed() == 1
    moved = paths[2].rename(paths[2].with_name("moved.png"))
    time.sleep(SETTLED_S)
    assert hashed() == 2  # the one that was young, and the new name
    os.replace(moved, paths[2])
    time.sleep(SETTLED_S)
    assert [hashed(), hashed()] == [1, 0]


SCAN = """
import sys
from pathlib import Path
from embedpipe.cache import KeyIndex
from embedpipe.data import read_manifest
index = KeyIndex(Path(sys.argv[1]) / "index.sqlite")
print(len(read_manifest([sys.argv[1] + "/photos"], key_of=index.key_of).samples), index.hashed)
index.close()
"""


def test_an_unchanged_file_costs_one_stat(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "photos", 30)
    ends = [trace(SCAN, tmp_path, calls="open,openat,%%stat,access,faccessat") for _ in range(2)]
    assert [done.stdout for done, _ in ends] == ["30 30\n", "30 0\n"], ends[0][0].stderr
    first, second = (log for _, log in ends)
    images = re.compile(r"/photos/.*\.png$")
    assert {path for path in opened(first) if images.search(path)} == set(map(str, paths))
    assert not [path for path in opened(second) if images.search(path)]
    assert Counter(path for path in looked_at(second) if images.search(path)) == dict.fromkeys(map(str, paths), 1)

"""Where flock fails or excludes nobody, two writers at once only add: nothing lost, nothing swept, nothing merged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ._proving import OPTIONS, features_of, keys_of, open_space, read_all
from ._tier import tier

WRITER = Path(__file__).with_name("_lockless_writer.py")
ROOT = WRITER.parents[2]
KEYS = keys_of(range(40))


@pytest.fixture(scope="module")
def without_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that takes the place of flock."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("flock is made to fail by LD_PRELOAD: that needs Linux and a C compiler (cc)")
    library = tmp_path_factory.mktemp("flock") / "flock.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(WRITER.with_name("flock.c"))]
    subprocess.run(command, check=True)
    return library


@pytest.mark.timeout(300)
@pytest.mark.parametrize("repeat", range(tier(1, 20)))
@pytest.mark.parametrize("flock", ["refuse", "agree"])
def test_two_writers_without_locks_only_add(tmp_path: Path, without_locks: Path, flock: str, repeat: int) -> None:
    space = open_space(tmp_path / "cache")
    with space.writer(**OPTIONS) as writer:
        writer.append(KEYS[:5], features_of(KEYS[:5]))
        writer.finish()
    base = space.features_path.read_bytes()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(without_locks), "FLOCK": flock, "PYTHONPATH": path}
    writers = [
        subprocess.Popen([sys.executable, str(WRITER), str(tmp_path), name], env=environment) for name in ("one", "two")
    ]
    try:
        assert [writer.wait(120) for writer in writers] == [0, 0]
    finally:
        for process in writers:
            process.kill()
    assert (space.folder / "shards" / "one.txt").read_bytes() == b"first half, second half"
    assert space.features_path.read_bytes() == base
    assert space.pending_shards == 20 + 30
    assert read_all(space) == set(KEYS)
    (space.folder / "shards" / ".tmp-of-a-killed-one").touch()
    with space.writer(**OPTIONS) as later:
        later.finish()
    assert space.pending_shards == 0
    assert not list(space.folder.rglob(".tmp-*"))
    assert read_all(space) == set(KEYS)

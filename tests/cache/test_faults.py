"""Killed, starved or refused at any point: nothing committed is lost, a resume ends the same."""

from __future__ import annotations

import errno
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import embedpipe.cache
from embedpipe.cache import Cache, Space
from embedpipe.errors import StorageError

from .conftest import SPEC, forked, kill_self, rows, write

PACKAGE = str(Path(embedpipe.cache.__file__).parent)
KEYS, X = rows(30)
REFERENCE_SHARD_ROWS = 10


def extract(space: Space, report: Path | None = None) -> None:
    """Commit 30 rows in three shards and merge them; after each commit note how many are safe."""
    options = {"feature_dim": X.shape[1], "dtype": "float32", "environment": {}, "pins": {}}
    with space.writer(**options, shard_rows=1000) as writer:  # type: ignore[arg-type]
        present = space.view()
        missing = [i for i in range(len(KEYS)) if KEYS[i] not in present]
        for start in range(0, len(missing), REFERENCE_SHARD_ROWS):
            part = missing[start : start + REFERENCE_SHARD_ROWS]
            writer.append([KEYS[i] for i in part], X[part])
            writer.commit()
            if report is not None:
                report.write_text(" ".join(str(i) for i in range(max(part) + 1)))
        writer.finish()


def kill_at_line(number: int) -> None:
    """Arrange for SIGKILL at the `number`-th line that the package executes."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        left -= event == "line"
        if left <= 0:
            kill_self()
        return trace

    sys.settrace(trace)


def lines_of(space: Space, counted: Path) -> int:
    """Return how many lines of the package a whole extraction executes."""

    def body() -> None:
        count = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal count
            inside = frame.f_code.co_filename.startswith(PACKAGE)
            count += inside and event == "line"
            return trace if inside else None

        sys.settrace(trace)
        extract(space)
        sys.settrace(None)
        counted.write_text(str(count))

    assert forked(body) == 0
    return int(counted.read_text())


def test_sigkill_at_any_point_loses_nothing_committed(tmp_path: Path) -> None:
    reference = Cache(tmp_path / "reference").open_space(SPEC)
    lines = lines_of(reference, tmp_path / "count")
    whole = reference.features_path.read_bytes()
    killed = 0
    for number in range(5, lines, max(1, lines // 18)):
        space = Cache(tmp_path / f"killed-{number}").open_space(SPEC)
        report = tmp_path / f"report-{number}"

        def body(space: Space = space, report: Path = report, number: int = number) -> None:
            kill_at_line(number)
            extract(space, report)

        killed += forked(body) == -9
        committed = len(report.read_text().split()) if report.exists() else 0
        assert committed == 0 or (space.view().read(KEYS[:committed]) == X[:committed]).all()
        extract(space)
        assert space.features_path.read_bytes() == whole
        assert (space.pending_shards, space.interrupted) == (0, False)
        assert not list(space.folder.rglob(".tmp-*"))
    assert killed >= 16


def test_a_write_refused_midway_is_a_storage_error(space: Space) -> None:
    write(space, KEYS[:10], X[:10])
    before = space.features_path.read_bytes()

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        write(space, KEYS, X)

    assert forked(body) == StorageError.exit_code
    assert space.features_path.read_bytes() == before
    assert not list(space.folder.rglob(".tmp-*"))
    write(space, KEYS, X)
    assert (space.view().read(KEYS) == X).all()


@pytest.mark.parametrize("call", ["fsync", "rename", "unlink", "chmod"])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 12])
def test_a_refused_system_call_is_a_storage_error(
    space: Space, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The kernel is made to say EIO once; the same command afterwards ends well."""
    real, left = getattr(os, call), number

    def once(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, once)
        with suppress(StorageError):
            extract(space)
            assert left > 0
    extract(space)
    assert (space.view().read(KEYS) == X).all()
    assert space.pending_shards == 0


def test_names_are_given_to_what_is_safe_on_disk(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename follows the fsync of its file and is followed by that of its folder."""
    steps: list[tuple[str, str]] = []
    real_fsync, real_rename, real_unlink = os.fsync, os.rename, os.unlink

    def fsync(descriptor: int) -> None:
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        steps.append(("rename", str(target)))
        assert ("fsync", str(source)) in steps
        real_rename(source, target)

    def unlink(path: Any, **named: Any) -> None:
        steps.append(("unlink", str(path)))
        real_unlink(path, **named)

    for name, spy in {"fsync": fsync, "rename": rename, "unlink": unlink}.items():
        monkeypatch.setattr(os, name, spy)
    extract(space)
    renamed = [i for i, (call, _) in enumerate(steps) if call == "rename"]
    assert len(renamed) == 6  # meta.json twice, three shards, features.h5
    for i in renamed:
        assert steps[i + 1] == ("fsync", str(Path(steps[i][1]).parent))
    assert [call for call, _ in steps].index("unlink") > steps.index(("rename", str(space.features_path)))
    made = [str(space.folder.parents[2]), *map(str, space.folder.parents[:2]), str(space.folder)]
    assert all(("fsync", folder) in steps for folder in made)


def test_a_reader_sees_every_row_through_writing_and_merging(space: Space) -> None:
    child = os.fork()
    if child == 0:
        for _ in range(2):
            extract(space)
            for start in range(0, 30, 3):
                write(space, KEYS[start : start + 3], X[start : start + 3], shard_rows=1)
        os._exit(0)
    most, looks = 0, 0
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        view = space.view()
        assert len(view) >= most
        most, looks = len(view), looks + 1
        here = [i for i in range(30) if KEYS[i] in view]
        assert not here or (view.read([KEYS[i] for i in here]) == X[here]).all()
    assert most == 30
    assert looks > 10

"""Run folders: whole or absent, found by id, prefix or path."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from embedpipe.errors import CacheBusy, ModelMismatch, UsageError
from embedpipe.runs import (
    csv_text,
    find_run,
    find_unfinished,
    latest_run,
    list_runs,
    lock_unfinished,
    new_run,
    read_run,
)


def make(runs: Path, verb: str = "fit-head") -> Path:
    with new_run(runs, verb) as run:
        run.write_json("run.json", {"verb": verb})
    return run.final


def test_a_run_appears_whole(tmp_path: Path) -> None:
    with new_run(tmp_path, "fit-head") as run:
        run.write_json("run.json", {"verb": "fit-head"})
        assert list_runs(tmp_path) == []
    assert list_runs(tmp_path) == list(tmp_path.iterdir()) == [run.final]
    assert read_run(run.final) == {"verb": "fit-head"}


def test_csv_gives_back_what_was_written() -> None:
    rows = [["a\rb", "c\nd", 'e"f', "g,h"], ["", "i", "1", "\r"]]
    text = csv_text(rows)
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows
    assert text.endswith("\n")
    assert not text.endswith("\r\n")


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_run(tmp_path, "fit-head") as run:
            run.write_json("run.json", {"verb": "fit-head"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_found_by_id_prefix_and_folder(tmp_path: Path) -> None:
    run = make(tmp_path)
    make(tmp_path, "finetune")
    for text in (run.name, run.name[:-2], run.name.rsplit("-", 1)[-1], str(run)):
        assert find_run(tmp_path, text) == run
    assert latest_run(tmp_path, "fit-head") == run
    with pytest.raises(UsageError, match="it matches 2 runs"):
        find_run(tmp_path, run.name[:4])
    with pytest.raises(UsageError, match="did you mean"):
        find_run(tmp_path, run.name + "x")
    with pytest.raises(UsageError, match="no run of extract"):
        latest_run(tmp_path, "extract")


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    run = make(tmp_path)
    (run / "run.json").write_text("{")
    with pytest.raises(ModelMismatch, match=r"run\.json"):
        read_run(run)


def test_what_nobody_can_go_on_with_is_removed(tmp_path: Path) -> None:
    """What is held, and what has a checkpoint, stays."""
    left, kept = tmp_path / ".unfinished-a-finetune-1", tmp_path / ".unfinished-b-finetune-2"
    for folder, file in ((left, ".tmp-x"), (kept, "checkpoint.pt")):
        folder.mkdir()
        (folder / file).write_bytes(b"x")
    with lock_unfinished(tmp_path, "c-finetune-3") as held:
        assert sorted(tmp_path.iterdir()) == [kept, held]
        with lock_unfinished(tmp_path, "d-finetune-4"):
            assert held.exists()
        with pytest.raises(CacheBusy), lock_unfinished(tmp_path, "c-finetune-3"):
            raise AssertionError("two hold it")
    assert list(tmp_path.iterdir()) == [kept]
    assert find_unfinished(tmp_path, "finetune") == "b-finetune-2"
    assert list_runs(tmp_path) == []

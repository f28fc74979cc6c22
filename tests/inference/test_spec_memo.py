"""A second run knows its space without loading torch, and asks again as soon as anything could have changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from embedpipe.cache import Cache, KeyIndex
from tests.conftest import TINY, Run

PROBE = (
    "import json, sys; from embedpipe.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
)


def ask(*arguments: object) -> tuple[dict[str, Any], bool]:
    """Run extract in a process of its own; return its envelope and whether torch was loaded."""
    command = [sys.executable, "-c", PROBE, "extract", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    envelope, loaded = done.stdout.splitlines()[-2:]
    return json.loads(envelope), loaded == "True"


def extract(*arguments: object) -> tuple[dict[str, Any], bool]:
    """Return the data of a run that must succeed, and whether torch was loaded."""
    envelope, loaded = ask(*arguments)
    assert envelope["ok"], envelope
    return envelope["data"], loaded


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return photos


def test_an_unchanged_second_run_loads_no_torch(here: Path) -> None:
    first, loaded = extract("photos", *TINY)
    assert loaded
    second, loaded = extract("photos", *TINY)
    assert not loaded
    changed = {"computed", "reused", "seconds", "images_per_second", "bottleneck", "advice", "executor", "spaces"}
    assert {k: v for k, v in first.items() if k not in changed} == {k: v for k, v in second.items() if k not in changed}
    assert (second["computed"], second["reused"]) == (0, 36)
    (here / "red" / "000.png").unlink()
    assert extract("photos", *TINY)[1] is False
    (here / "red" / "001.png").write_bytes((here / "blue" / "000.png").read_bytes() + b"other bytes")
    third, loaded = extract("photos", *TINY)
    assert loaded
    assert third["computed"] == 1


def test_who_comes_second_is_told_before_a_model_is_loaded(here: Path) -> None:
    extract("photos", *TINY)
    (here / "red" / "more.png").write_bytes((here / "red" / "000.png").read_bytes() + b"other bytes")
    [space] = Cache(Path("cache")).spaces()
    with space.writer(feature_dim=96, dtype="float32", environment={}, pins={}):
        envelope, loaded = ask("photos", *TINY)
    assert envelope["error"]["code"] == "CacheBusy"
    assert f"process {os.getpid()} on " in envelope["error"]["message"]
    assert not loaded


def test_another_question_is_another_answer(here: Path, run: Run) -> None:
    other = ([], ["--seed", 1], ["--image-size", 64], ["--layer", "layer3"], ["--store-dtype", "float16"])
    found = [run("extract", here, *TINY, *options, "--json").data for options in other]
    assert len({one["fingerprint"] for one in found}) == len(other)
    assert [one["computed"] for one in found] == [36] * len(other)


def test_a_weights_file_that_changes_is_read_again(here: Path, run: Run) -> None:
    torch.manual_seed(0)
    state = timm.create_model("test_resnet").state_dict()
    flags = ["--backbone", "test_resnet", "--weights", here / "w.safetensors"]
    save_file(state, here / "w.safetensors")
    old = time.time() - 60
    os.utime(here / "w.safetensors", (old, old))
    first = run("extract", here, *flags, "--json").data
    assert run("extract", here, *flags, "--json").data["fingerprint"] == first["fingerprint"]
    state["conv1.weight" if "conv1.weight" in state else next(iter(state))].add_(1e-6)
    save_file(state, here / "w.safetensors")
    os.utime(here / "w.safetensors", (old, old))
    assert run("extract", here, *flags, "--json").data["fingerprint"] != first["fingerprint"]


def test_a_lost_or_foreign_answer_costs_time_only(tmp_path: Path) -> None:
    index = KeyIndex(tmp_path / "index.sqlite")
    assert index.get_text("a question") is None
    index.put_text("a question", "an answer")
    index.close()
    again = KeyIndex(tmp_path / "index.sqlite")
    assert again.get_text("a question") == "an answer"
    again.close()
    blocked = KeyIndex(Path("/proc/no/index.sqlite"))
    blocked.put_text("a question", "an answer")
    blocked.close()

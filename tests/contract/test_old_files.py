"""Caches and runs that embedpipe 0.1.0 wrote are read and reused.

`written_by_0_1/` is copied to another folder first, so these are a cache and runs that were moved, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import embedpipe as ep
from tests.contract.conftest import CommandLine

FIXTURE = Path(__file__).with_name("written_by_0_1")
BACKBONE = ("--backbone", "timm:test_convnext", "--weights", "none", "--image-size", 64)
EAGER = ("--executor", "eager", "--batch-size", 8, "--device", "cpu")
FINETUNE = (
    "--unfreeze", "stages.3", "--epochs", 2, "--batch-size", 8, "--lr", 0.0001, "--cache-activations", "on", "--device", "cpu",
)  # fmt: skip
DATASET, ROWS = "images-f4549e727382", 27
SPACE = "timm-test_convnext-a89b48d54b18"
FIT_HEAD, FINE_TUNED = "20261130-213745-fit-head-e7c132", "20261130-213823-finetune-7238c7"


@pytest.fixture
def run(tmp_path: Path) -> CommandLine:
    """The command line in a copy of what version 0.1.0 wrote."""
    return CommandLine(shutil.copytree(FIXTURE, tmp_path / "moved"))


def probabilities_of(data: dict[str, Any]) -> np.ndarray:
    """Return the probabilities (N, C) of predictions, images and classes in plain order."""
    predictions = sorted(data["predictions"], key=lambda prediction: str(prediction["path"]))
    return np.array([[value for _, value in sorted(each["probabilities"].items())] for each in predictions])


def stored_probabilities(verb: str) -> np.ndarray:
    return probabilities_of(json.loads((FIXTURE / f"predictions-{verb}.json").read_text())["data"])


def report_of(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((FIXTURE / "runs" / name / "run.json").read_text())["report"]
    return report


def test_extract_computes_nothing(run: CommandLine) -> None:
    before = (run.folder / "cache/spaces" / SPACE / "features.h5").read_bytes()
    data = run("extract", "images", *BACKBONE, *EAGER, "--json").data
    assert (data["computed"], data["reused"], data["rows"]) == (0, ROWS, ROWS)
    assert Path(data["space"]).name == SPACE
    assert (run.folder / "cache/spaces" / SPACE / "features.h5").read_bytes() == before


def test_fit_head_gives_the_same_head(run: CommandLine) -> None:
    data = run("fit-head", DATASET, "--select", "accuracy", "--json").data  # the default then
    old = report_of(FIT_HEAD)
    assert data["dataset"] == DATASET
    assert data["l2"] == old["l2"]
    predicted = run("predict", data["run"], "images", "--probabilities", "--json").data
    assert probabilities_of(predicted) == pytest.approx(stored_probabilities("fit-head"), abs=1e-5)
    for split in ("train", "val", "test"):
        assert data["metrics"][split]["accuracy"] == old["metrics"][split]["accuracy"]


@pytest.mark.parametrize(("name", "verb"), [(FIT_HEAD, "fit-head"), (FINE_TUNED, "finetune")])
def test_predict_gives_the_stored_probabilities(run: CommandLine, name: str, verb: str) -> None:
    data = run("predict", name, "images", "--probabilities", "--json").data
    assert probabilities_of(data) == pytest.approx(stored_probabilities(verb), abs=1e-6)
    assert len(data["predictions"]) == ROWS


@pytest.mark.parametrize(("name", "verb"), [(FIT_HEAD, "fit-head"), (FINE_TUNED, "finetune")])
def test_python_loads_the_runs(run: CommandLine, name: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder)
    classifier = ep.Classifier.load(Path("runs", name))
    paths = sorted(str(path) for path in Path("images").rglob("*.*"))
    assert classifier.predict_proba(paths) == pytest.approx(stored_probabilities(verb), abs=1e-6)


def test_evaluate_and_compare_read_the_runs(run: CommandLine) -> None:
    scored = run("evaluate", FIT_HEAD, "images/test", "--json").data
    assert scored["metrics"]["accuracy"] == report_of(FIT_HEAD)["metrics"]["test"]["accuracy"]
    compared = run("compare", FIT_HEAD, FINE_TUNED, "--json").data
    assert compared["n"] == 6
    assert compared["matched_by"] == "content"


def test_finetune_reuses_the_activations(run: CommandLine) -> None:
    assert run("extract", "images", *BACKBONE, *EAGER).code == 0
    head = run("fit-head", "--select", "accuracy", "--json").data["run"]
    data = run("finetune", head, *FINETUNE, "--json").data
    assert data["activations"]["cached"] is True
    assert data["activations"]["reused"] == data["activations"]["rows"] == ROWS
    old = report_of(FINE_TUNED)
    assert data["unfrozen"] == old["unfrozen"]
    losses = [[epoch["val_loss"] for epoch in report["epochs"]] for report in (data, old)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_verify_finds_no_damage(run: CommandLine) -> None:
    data = run("cache", "verify", "--json").data  # exits 0 although the images of the old table are elsewhere
    assert data["damaged"] is False
    assert {space["space"]: space["rows"] for space in data["spaces"]}[SPACE] == ROWS
    assert "damage" not in {finding["kind"] for finding in data["findings"]}


def test_verify_checks_the_moved_images_once_they_are_extracted(run: CommandLine) -> None:
    dataset = run("extract", "images", *BACKBONE, *EAGER, "--json").data["dataset"]
    data = run("cache", "verify", dataset, "--json").data
    assert (data["damaged"], data["findings"], data["files"]) == (False, [], ROWS)


def test_ls_info_and_why_read_the_cache(run: CommandLine) -> None:
    data = run("cache", "ls", "--json").data
    assert SPACE in {space["space"] for space in data["spaces"]}
    assert sorted(space["rows"] for space in data["spaces"]) == [12, 15, ROWS]
    assert not any(space["damage"] for space in data["spaces"])
    assert [(each["dataset"], each["images"]) for each in data["datasets"]] == [(DATASET, ROWS)]
    info = run("cache", "info", SPACE, "--json").data
    assert info["fingerprint"].startswith(SPACE[-12:])
    assert info["environments"][0]["embedpipe"] == "0.1.0"
    why = run("cache", "why", "images", *BACKBONE, "--json").data
    assert (why["space"], why["hits"], why["misses"]) == (SPACE, ROWS, 0)


def test_export_writes_the_stored_features(run: CommandLine) -> None:
    with h5py.File(FIXTURE / "cache/spaces" / SPACE / "features.h5") as file:
        stored = np.sort(file["features"][:], axis=0)
    data = run("cache", "export", DATASET, "--out", "all.h5", "--json").data
    assert (data["rows"], data["feature_dim"]) == (ROWS, 64)
    with h5py.File(run.folder / "all.h5") as file:
        assert np.array_equal(np.sort(file["features"][:], axis=0), stored)


@pytest.mark.parametrize("name", ["features.h5", "meta.json"])
def test_a_newer_format_is_refused(run: CommandLine, name: str) -> None:
    """The version is checked before the digest of the header, so a file that only claims a newer one is refused for that."""
    path = run.folder / "cache/spaces" / SPACE / name
    old = path.read_bytes()
    newer = old.replace(b'"format_version":1', b'"format_version":9').replace(
        b'"format_version": 1', b'"format_version": 9'
    )
    assert newer != old
    path.write_bytes(newer)
    completed = run("fit-head", DATASET, "--json")
    assert completed.code == 4
    assert completed.envelope["error"]["code"] == "CacheMismatch"
    assert "version 9" in completed.envelope["error"]["message"]
    assert run("extract", "images", *BACKBONE, *EAGER).code == 4
    assert path.read_bytes() == newer

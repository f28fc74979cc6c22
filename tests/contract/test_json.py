"""JSON output and exit codes of every command.

`json_keys.json` holds, for each case, the exit code and the keys of `data` as dotted paths; `[]` stands for the items of
a list. A key may be added. A key that disappears, or another exit code, is a failure.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from embedpipe import cli
from embedpipe.cli.cache import cache
from tests.contract.conftest import RECORD, CommandLine, Completed, write_split_folders

KEYS_FILE = Path(__file__).with_name("json_keys.json")
RECORDED: dict[str, Any] = json.loads(KEYS_FILE.read_text()) if KEYS_FILE.exists() else {}
OPTIONS_FILE = Path(__file__).with_name("options.json")
TINY = ("--backbone", "timm:test_resnet", "--weights", "none")
EAGER = ("--executor", "eager", "--batch-size", "8", "--device", "cpu")
COMMANDS = (
    "extract", "fit-head", "finetune", "predict", "evaluate", "compare", "audit", "advise", "export", "models", "layers",
    "demo", "cache ls", "cache info", "cache why", "cache verify", "cache gc", "cache rm", "cache export",
)  # fmt: skip


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of every key in a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            child = f"{path}.{key}" if path else key
            yield child
            yield from key_paths(item, child)
    elif isinstance(value, list):
        for item in value:
            yield from key_paths(item, f"{path}[]")


def run_all_commands(run: CommandLine) -> dict[str, Completed]:
    """Run each command on a tiny data set and return the results by case."""
    photos = write_split_folders(run.folder / "photos", {"train": 6, "val": 3, "test": 3})
    shutil.copy(photos / "train/blue/000.png", photos / "test/blue/copy.png")
    shutil.copy(photos / "train/blue/001.png", photos / "train/red/mislabelled.png")
    broken = write_split_folders(run.folder / "broken", {"train": 2})
    (broken / "train/red/cut.png").write_bytes((broken / "train/red/000.png").read_bytes()[:200])
    results: dict[str, Completed] = {}

    def case(name: str, *arguments: object) -> Completed:
        results[name] = run(*arguments, "--json")
        return results[name]

    case("extract: dry run", "extract", "photos", *TINY, *EAGER, "--dry-run")
    case("cache why: no space", "cache", "why", "photos", *TINY)
    extracted = case("extract", "extract", "photos", *TINY, *EAGER).data
    photos_id, space = extracted["dataset"], f"timm-test_resnet-{extracted['fingerprint'][:12]}"
    case("cache why: another space", "cache", "why", "photos", *TINY, "--image-size", 96)
    case("fit-head: knn", "fit-head", "--solver", "knn")
    case("fit-head: shots", "fit-head", "--l2", 0.1, "--shots", "1,2", "--repeats", 2)
    case("fit-head: folds", "fit-head", "--l2", 0.1, "--folds", 2)
    head = case("fit-head", "fit-head").data["run"]
    options = ("--epochs", 1, "--batch-size", 8, "--device", "cpu", "--cache-activations", "on")
    tuned = case("finetune", "finetune", head, "--unfreeze", "layer4", *options).data["run"]
    case("predict", "predict", head, "photos/test/red")
    case("predict: probabilities", "predict", tuned, "photos/test/red", "--probabilities")
    case("predict: broken image", "predict", head, "broken")
    case("evaluate", "evaluate", head)
    case("evaluate: other data", "evaluate", tuned, "broken")
    case("compare", "compare", head, tuned)
    case("audit", "audit", "--l2", 0.1)
    case("export", "export", tuned, "--format", "timm", "--output", "as-timm")
    case("models", "models", "test_*")
    case("layers", "layers", "timm:test_resnet")
    write_split_folders(run.folder / "pair", {"train": 4, "val": 2}, classes=2)
    assert run("extract", "pair", *TINY, *EAGER).code == 0
    case("advise", "advise", "--epochs", 1)
    case("cache ls", "cache", "ls")
    case("cache info", "cache", "info", space)
    case("cache verify", "cache", "verify")
    case("cache export: h5", "cache", "export", photos_id, "--layer", "penultimate", "--out", "all.h5")
    case(
        "cache export: npy",
        "cache",
        "export",
        photos_id,
        "--layer",
        "penultimate",
        "--format",
        "npy",
        "--out",
        "all.npz",
    )
    case("extract: broken image", "extract", "broken", *TINY, *EAGER)
    case("extract: broken image, strict", "extract", "broken", *TINY, *EAGER, "--strict")
    case("cache ls: all", "cache", "ls")
    case("cache gc: dry run", "cache", "gc", "--max-size", "1KB", "--dry-run")
    case("cache rm", "cache", "rm", space)
    case("cache gc", "cache", "gc", "--max-size", "1KB")
    return results


CASES = sorted(RECORDED) or ["extract"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Completed]:
    return run_all_commands(CommandLine(tmp_path_factory.mktemp("json")))


@pytest.mark.skipif(not RECORD, reason="references are recorded on request")
def test_record(results: dict[str, Completed]) -> None:
    for name, completed in results.items():
        old = RECORDED.get(name, {"keys": []})
        keys = sorted({*old["keys"], *key_paths(completed.envelope.get("data"))})
        RECORDED[name] = {"code": completed.code, "keys": keys}
    KEYS_FILE.write_text(json.dumps(RECORDED, indent=1, sort_keys=True) + "\n")


def test_every_case_is_recorded(results: dict[str, Completed]) -> None:
    assert set(results) == set(RECORDED)


@pytest.mark.parametrize("name", CASES)
def test_exit_code_and_keys(results: dict[str, Completed], name: str) -> None:
    completed = results[name]
    assert completed.code == RECORDED[name]["code"], completed.err
    assert completed.out.count("\n") == 1
    body = "data" if completed.envelope["ok"] else "error"
    assert set(completed.envelope) >= {"schema", "command", "ok", body, "warnings"}
    assert completed.envelope["ok"] is (completed.code in (0, 3))
    assert completed.envelope["schema"] == 1
    assert completed.envelope["command"] == name.partition(":")[0]
    missing = set(RECORDED[name]["keys"]) - set(key_paths(completed.envelope.get("data")))
    assert not missing, f"keys that disappeared: {sorted(missing)}"


def test_values_of_the_first_extraction(results: dict[str, Completed]) -> None:
    data = results["extract"].data
    assert data["images"] == 38
    assert data["rows"] == data["computed"] == 36  # two files have the bytes of another one
    assert (data["reused"], data["failed"], data["feature_dim"]) == (0, [], 96)
    assert data["classes"] == ["blue", "green", "red"]
    assert data["splits"] == {"train": 19, "val": 9, "test": 10}


def test_every_command_is_held_by_the_contract() -> None:
    groups = {name.split()[0] for name in COMMANDS}
    assert groups == set(cli.COMMANDS)
    assert {f"cache {name}" for name in cache.commands} == {name for name in COMMANDS if name.startswith("cache ")}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command_line: CommandLine, command: str) -> None:
    completed = command_line(*command.split(), "--help")
    assert completed.code == 0
    names = re.findall(r"^\W*(--[a-z][a-z0-9-]*)(?:/(--[a-z-]+))?", completed.out, re.MULTILINE)
    options = {name for pair in names for name in pair if name}
    if RECORD:
        old = json.loads(OPTIONS_FILE.read_text()) if OPTIONS_FILE.exists() else {}
        old[command] = sorted(options | set(old.get(command, ())))
        OPTIONS_FILE.write_text(json.dumps(old, indent=1, sort_keys=True) + "\n")
    missing = set(json.loads(OPTIONS_FILE.read_text())[command]) - options
    assert not missing, f"options that disappeared: {sorted(missing)}"


def test_version(command_line: CommandLine) -> None:
    completed = command_line("--version")
    assert completed.code == 0
    assert re.fullmatch(r"embedpipe \d+\.\d+\.\d+\S*\n", completed.out)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["extrct", "x"], "extract"),
        (["cache", "verfy"], "verify"),
        (["extract", "photos", "--bakbone", "resnet18"], "--backbone"),
        (["fit-head", "--solver", "newtonn"], "newton"),
        (["extract", "photos", "--backbone", "resnet81", "--weights", "none"], "resnet18"),
        (["extract", "photos", *TINY, "--layer", "layer9"], "layer4"),
        (["layers", "resnet81"], "resnet18"),
        (["predict", "no-run", "photos"], "no-run"),
    ],
)
def test_unknown_names_exit_2_and_name_the_nearest(
    command_line: CommandLine, arguments: list[str], nearest: str
) -> None:
    write_split_folders(command_line.folder / "photos", {"train": 1})
    completed = command_line(*arguments, "--json")
    assert completed.code == 2
    assert completed.envelope["ok"] is False
    error = completed.envelope["error"]
    assert set(error) >= {"code", "message", "hint"}
    assert error["code"] == "UsageError"
    assert nearest in error["message"] + error["hint"]
    assert completed.err.splitlines()[-1].startswith("error: ")
    assert not (command_line.folder / "cache").exists()


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        ("fit-head:\n  sovler: knn\n", "solver"),
        ("fit-haed:\n  solver: knn\n", "fit-head"),
        ("chache_dir: x\n", "cache_dir"),
    ],
)
def test_unknown_keys_of_a_config_exit_2_and_name_the_nearest(
    command_line: CommandLine, config: str, nearest: str
) -> None:
    (command_line.folder / "settings.yaml").write_text(config)
    completed = command_line("fit-head", "--config", "settings.yaml")
    assert completed.code == 2
    assert nearest in completed.err


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A working folder in which six images are extracted."""
    run = CommandLine(tmp_path_factory.mktemp("extracted"))
    write_split_folders(run.folder / "photos", {"train": 1, "val": 1})
    assert run("extract", "photos", *TINY, *EAGER).code == 0
    return run


def copy_of(extracted: CommandLine, folder: Path) -> tuple[CommandLine, Path]:
    """Copy a working folder; return its command line and its space."""
    shutil.copytree(extracted.folder, folder)
    [space] = (folder / "cache/spaces").iterdir()
    return CommandLine(folder), space


def test_a_damaged_space_fails_verification(extracted: CommandLine, tmp_path: Path) -> None:
    run, space = copy_of(extracted, tmp_path / "copy")
    with h5py.File(space / "features.h5", "r") as file:
        offset = file["features"].id.get_offset()
    damaged = bytearray((space / "features.h5").read_bytes())
    damaged[offset + 100] ^= 0xFF
    (space / "features.h5").write_bytes(damaged)
    completed = run("cache", "verify", "--json")
    assert completed.code == 4
    assert completed.envelope["ok"] is False
    assert completed.envelope["error"]["code"] == "CacheMismatch"
    assert {"kind", "place", "detail"} <= set(completed.envelope["data"]["findings"][0])


def test_weights_of_another_model_exit_4(extracted: CommandLine, tmp_path: Path) -> None:
    run, _ = copy_of(extracted, tmp_path / "copy")
    save_file({"weight": np.zeros((2, 2), np.float32)}, run.folder / "other.safetensors")
    completed = run("extract", "photos", "--backbone", "timm:test_resnet", "--weights", "other.safetensors", "--json")
    assert completed.code == 4
    assert completed.envelope["error"]["code"] == "ModelMismatch"


def test_a_held_lock_exits_75(extracted: CommandLine, tmp_path: Path) -> None:
    run, space = copy_of(extracted, tmp_path / "copy")
    write_split_folders(run.folder / "photos", {"train": 2})
    with (space / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        completed = run("extract", "photos", *TINY, *EAGER, "--json")
    assert completed.code == 75
    assert completed.envelope["error"]["code"] == "CacheBusy"
    assert run("extract", "photos", *TINY, *EAGER, "--json").data["computed"] == 3


def test_a_cache_folder_that_cannot_be_made_exits_74(extracted: CommandLine, tmp_path: Path) -> None:
    run, _ = copy_of(extracted, tmp_path / "copy")
    (run.folder / "file").touch()  # root may write into read-only folders, but nobody into a file
    completed = run("extract", "photos", *TINY, *EAGER, "--cache-dir", "file/cache", "--json")
    assert completed.code == 74
    assert completed.envelope["error"]["code"] == "StorageError"
    assert run("fit-head", "--l2", 0.1, "--runs-dir", "file/runs").code == 74


def test_no_weights_without_a_network_exits_1(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_split_folders(command_line.folder / "photos", {"train": 1})
    completed = command_line("extract", "photos", "--backbone", "timm:test_resnet", "--json")
    assert completed.code == 1
    assert completed.envelope["error"]["code"] == "WeightsUnavailable"

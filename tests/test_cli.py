"""The command line: the whole loop, the envelope, exit codes, and where a value comes from."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.conftest import COLOURS, TINY, Run, write_photo, write_photos


def test_the_whole_loop(run: Run, photos: Path) -> None:
    first = run("extract", photos, *TINY, "--json").data
    assert (first["images"], first["computed"], first["reused"]) == (36, 36, 0)
    assert first["classes"] == ["blue", "green", "red"]
    assert sum(first["splits"].values()) == 36
    assert set(first) >= {
        "dataset", "spaces", "fingerprint", "space", "features", "feature_dim", "rows", "ignored", "pending_shards",
        "failed", "seconds", "images_per_second", "executor", "bottleneck",
    }  # fmt: skip

    second = run("extract", photos, *TINY, "--json").data
    assert (second["computed"], second["reused"]) == (0, 36)

    fitted = run("fit-head", "--json").data
    assert fitted["metrics"]["test"]["accuracy"] == 1.0
    assert 5 <= len(fitted["l2_path"]) < 45
    assert set(fitted["l2_path"][0]) == {"l2", "val_accuracy", "val_log_loss", "objective"}

    tuned = run("finetune", "--unfreeze", "layer4", "--epochs", 2, "--batch-size", 8, "--json").data
    assert tuned["handoff_max_abs_diff"] < 1e-3
    assert [epoch["epoch"] for epoch in tuned["epochs"]] == [0, 1, 2]
    assert all(name.startswith(("head.", "backbone.model.layer4")) for name in tuned["unfrozen"])

    for made in (fitted, tuned):
        done = run("predict", made["run"], photos / "red", "--json").data
        assert [p["label"] for p in done["predictions"]] == ["red"] * 12
        scored = run("evaluate", made["run"], photos, "--json").data
        assert scored["metrics"]["n"] == 36
        low, high = scored["metrics"]["accuracy_ci95"]
        assert low < scored["metrics"]["accuracy"] <= high

    again = run("extract", photos, "--backbone", f"runs/{tuned['run']}/model", "--json").data
    assert again["computed"] == 36
    assert again["fingerprint"] != first["fingerprint"]


def test_predict_prints_csv(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    name = run("fit-head", "--json").data["run"]
    done = run("predict", name, photos / "blue" / "000.png", "--top", 2)
    rows = list(csv.reader(io.StringIO(done.out)))
    assert rows[0] == ["path", "label", "probability"]
    assert rows[1][1] == "blue"
    assert len(rows) == 3
    wide = run("predict", name, photos / "blue", "--probabilities", "--json").data["predictions"][0]
    assert sum(wide["probabilities"].values()) == pytest.approx(1)


def test_prediction_of_known_images_does_not_touch_them(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    name = run("fit-head", "--json").data["run"]
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "embedpipe", "predict", name, photos / "red"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.count("red") >= 12
    assert " torch\n" not in process.stderr


def test_confusion_matrix(run: Run, photos: Path, tmp_path: Path) -> None:
    run("extract", photos, *TINY)
    name = run("fit-head", "--json").data["run"]
    wrong = tmp_path / "wrong"
    write_photo(wrong / "green" / "a.png", COLOURS["red"], 1)
    write_photo(wrong / "green" / "b.png", COLOURS["green"], 2)
    run("evaluate", name, wrong, "--confusion", "c.csv")
    rows = list(csv.reader(io.StringIO(Path("c.csv").read_text())))
    assert rows[0][1:] == ["blue", "green", "red"]
    assert rows[2] == ["green", "0", "1", "1"]


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn", "knn"])
def test_every_solver(run: Run, photos: Path, solver: str) -> None:
    run("extract", photos, *TINY)
    l2 = ["--l2", "0.01"] if solver != "knn" else []
    fitted = run("fit-head", "--solver", solver, *l2, "--json").data
    assert fitted["solver"] == solver
    assert fitted["metrics"]["val"]["accuracy"] > 0.5


def test_layers_are_spaces_of_their_own(run: Run, photos: Path) -> None:
    done = run("extract", photos, *TINY, "--layer", "layer1", "--layer", "layer3", "--json").data
    assert [space["layer"] for space in done["spaces"]] == ["layer1", "layer3"]
    assert len({space["fingerprint"] for space in done["spaces"]}) == 2
    assert run("fit-head", "--layer", "layer3", "--json").data["metrics"]["test"]["n"] > 0
    refused = run("finetune", "--unfreeze", "layer4")
    assert refused.code == 2


def test_what_shapes_a_feature_makes_another_space(run: Run, photos: Path) -> None:
    fields = [
        [], ["--seed", 1], ["--layer", "layer2"], ["--precision", "bf16"], ["--store-dtype", "float16"],
        ["--image-size", 96], ["--crop-pct", 0.7], ["--interpolation", "nearest"], ["--backbone", "timm:test_vit"],
    ]  # fmt: skip
    prints = [run("extract", photos, *TINY, *extra, "--json").data for extra in fields]
    assert len({p["spaces"][-1]["fingerprint"] for p in prints}) == len(fields)
    for extra in (["--batch-size", 5], ["--workers", 1], ["--limit", 7], ["--split-by", "hash"]):
        same = run("extract", photos, *TINY, *extra, "--json").data
        assert (same["computed"], same["fingerprint"]) == (0, prints[0]["fingerprint"])


def test_moved_and_relabelled_images_compute_nothing(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    (photos / "red" / "000.png").rename(photos / "blue" / "moved.png")
    photos.rename(photos.with_name("elsewhere"))
    write_photo(photos.with_name("elsewhere") / "green" / "new.png", COLOURS["green"], 99)
    done = run("extract", photos.with_name("elsewhere"), *TINY, "--json").data
    assert (done["computed"], done["reused"]) == (1, 36)


def test_help_is_quick_and_loads_no_torch() -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "embedpipe", "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rsplit("|", 1)[-1].strip() for line in process.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "h5py", "sklearn", "timm", "pydantic"}
    assert "extract" in process.stdout


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, embedpipe; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        "extract",
        "fit-head",
        "finetune",
        "predict",
        "evaluate",
        "compare",
        "audit",
        "advise",
        "models",
        "layers",
        "demo",
    ],
)
def test_every_help_carries_an_example(run: Run, command: str) -> None:
    text = run(command, "--help").out
    assert f"embedpipe {command}" in text.partition("Example:")[2]


def test_flag_over_environment_over_config_over_default(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("extract", photos, *TINY)
    Path("c.yaml").write_text("fit-head:\n  l2: 1.0\n")

    def l2(*flags: object) -> float:
        return float(run("fit-head", "--json", *flags).data["l2"])

    assert l2("--config", "c.yaml") == 1.0
    monkeypatch.setenv("EMBEDPIPE_FIT_HEAD_L2", "2.0")
    assert l2("--config", "c.yaml") == 2.0
    assert l2("--config", "c.yaml", "--l2", 3) == 3.0


def test_a_key_twice_in_a_config_is_refused(run: Run, photos: Path) -> None:
    for text in ("fit-head:\n  l2: 0.1\nfit-head:\n  refit: true\n", "fit-head:\n  l2: 0.1\n  l2: 1\n"):
        Path("c.yaml").write_text(text)
        ended = run("fit-head", "--config", "c.yaml")
        assert ended.code == 2
        assert "twice, expected it once" in ended.err


def test_an_input_that_no_memory_holds_is_refused(run: Run, photos: Path) -> None:
    ended = run("extract", photos, "--backbone", "timm:test_resnet", "--weights", "none", "--image-size", 100_000)
    assert ended.code == 2
    assert "images of 100000 x 100000, expected at most 178956970 pixels" in ended.err


def test_shared_options_before_and_after_the_command(run: Run, photos: Path) -> None:
    before = run("--cache-dir", "elsewhere", "--json", "extract", photos, *TINY).data
    after = run("extract", photos, *TINY, "--cache-dir", "elsewhere", "--json").data
    assert before["space"].startswith("elsewhere/")
    assert after["reused"] == 36
    Path("c.yaml").write_text("cache_dir: elsewhere\nextract:\n  backbone: timm:test_resnet\n  weights: none\n")
    for flags in (["--config", "c.yaml", "extract", photos], ["extract", photos, "--config", "c.yaml"]):
        assert run(*flags, "--json").data["reused"] == 36


def test_the_same_order_holds_for_what_commands_share(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text("cache-dir: from-config\n")
    run("extract", photos, *TINY, "--config", "c.yaml")
    monkeypatch.setenv("EMBEDPIPE_CACHE_DIR", "from-environment")
    run("extract", photos, *TINY, "--config", "c.yaml")
    run("--cache-dir", "from-flag", "extract", photos, *TINY, "--config", "c.yaml")
    run("--cache-dir", "before", "extract", photos, *TINY, "--cache-dir", "after")
    found = sorted(path.parent.name for path in Path().glob("*/latest.json"))
    assert found == ["after", "from-config", "from-environment", "from-flag"]


def test_a_variable_that_no_option_has_is_told(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDPIPE_EXTRACT_BACKBONE", "timm:test_resnet")
    monkeypatch.setenv("EMBEDPIPE_EXTRACT_WIEGHTS", "none")
    assert "did you mean EMBEDPIPE_EXTRACT_WEIGHTS" in run("extract", photos).line
    assert run("cache", "ls").code == 0  # other commands have other variables
    monkeypatch.setenv("EMBEDPIPE_CACHE_LS_JASON", "1")
    assert run("cache", "ls").code == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("fit-head:\n  sovler: knn\n", "solver"),
        ("fit-heads:\n  solver: knn\n", "fit-head"),
        ("chache_dir: x\n", "cache_dir"),
        ("fit-head:\n  solver: newtonn\n", "lbfgs"),
        ("- 1\n", "keys"),
        ("a: [\n", "YAML"),
        ("!!python/object/apply:os.system ['touch pwned']\n", "YAML"),
    ],
)
def test_a_wrong_config_is_one_line(run: Run, text: str, wanted: str) -> None:
    Path("c.yaml").write_text(text)
    done = run("fit-head", "--config", "c.yaml")
    assert done.code == 2
    assert wanted in done.line
    assert not Path("pwned").exists()


def test_json_errors_have_an_envelope(run: Run) -> None:
    done = run("extract", "nowhere", "--json")
    assert done.code == 2
    assert done.envelope["ok"] is False
    assert set(done.envelope["error"]) == {"code", "message", "hint"}
    assert done.envelope["command"] == "extract"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["extrct", "x"], "extract"),
        (["extract", "x", "--bakbone", "y"], "--backbone"),
        (["extract"], "DATA"),
        (["extract", "nowhere"], "nowhere"),
        (["fit-head"], "extract"),
        (["fit-head", "nothing"], "extract"),
        (["fit-head", "--l2", "much"], "--l2"),
        (["finetune", "--unfreeze", "layer4"], "fit-head"),
        (["finetune"], "--unfreeze"),
        (["predict", "no-run", "x.png"], "no-run"),
        (["layers", "resnet81"], "resnet18"),
    ],
)
def test_usage_errors_name_what_to_do(run: Run, arguments: list[str], wanted: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert wanted in done.line
    assert not Path("cache").exists()
    assert not Path("runs").exists()


def test_bad_folders(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("extract", tmp_path / "empty", *TINY).code == 2
    one = write_photos(tmp_path / "one", 4, ("red",))
    done = run("extract", one, *TINY, "--json")
    assert done.code == 0
    assert any("class" in warning for warning in done.envelope["warnings"])
    refused = run("fit-head")
    assert refused.code == 2
    assert "at least 2" in refused.line


def test_a_class_with_one_image(run: Run, photos: Path) -> None:
    write_photo(photos / "violet" / "only.png", (150, 40, 200), 1)
    done = run("extract", photos, *TINY, "--json")
    assert done.code == 0
    assert any("violet" in warning for warning in done.envelope["warnings"])
    assert run("fit-head", "--json").code == 0


def test_bad_images_are_recorded_and_the_rest_goes_on(run: Run, photos: Path) -> None:
    (photos / "red" / "zero.png").write_bytes(b"")
    (photos / "red" / "text.jpg").write_text("no image")
    whole = (photos / "red" / "000.png").read_bytes()
    (photos / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    odd = os.fsencode(photos / "red") + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((photos / "red" / "001.png").read_bytes() + b" ")
    for _ in range(2):  # known failures are not tried again, and still told
        done = run("extract", photos, *TINY, "--json")
        assert done.code == 3
        failed = {Path(f["path"]).name: f for f in done.data["failed"]}
        assert set(failed) == {"zero.png", "text.jpg", "cut.png"}
        assert all(f["reason"] and f["stage"] == "decode" for f in failed.values())
    assert (done.data["computed"], done.data["reused"]) == (0, 37)
    assert run("extract", photos, *TINY, "--strict").code == 1
    assert run("fit-head", "--json").code == 0
    name = run("fit-head", "--json").data["run"]
    part = run("predict", name, photos / "red", "--json")
    assert part.code == 3
    assert len(part.data["predictions"]) == 13


def test_names_that_are_no_utf8_come_out_as_they_are(run: Run, photos: Path) -> None:
    odd = os.fsencode(photos / "red") + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((photos / "red" / "001.png").read_bytes() + b" ")
    run("extract", photos, *TINY)
    name = run("fit-head", "--l2", 0.1, "--json").data["run"]
    command = [sys.executable, "-m", "embedpipe", "predict", name, odd]
    assert subprocess.run(command, capture_output=True, check=True).stdout.count(odd) == 1


def test_a_manifest_with_a_missing_label(run: Run, photos: Path) -> None:
    Path("m.csv").write_text(f"path,label\n{photos}/red/000.png,red\n{photos}/red/001.png,\n")
    done = run("extract", "m.csv", *TINY, "--allow-outside")
    assert done.code == 2
    assert "label" in done.line


def test_a_weights_file_of_another_model(run: Run, photos: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), "other.safetensors")
    done = run("extract", photos, "--backbone", "test_resnet", "--weights", "other.safetensors")
    assert done.code == 4
    Path("garbage.pth").write_bytes(b"not weights")
    assert run("extract", photos, "--backbone", "test_resnet", "--weights", "garbage.pth").code in (2, 4)
    assert run("extract", photos, "--backbone", "test_resnet", "--weights", "absent.pth").code == 2


def test_unknown_layer_and_unfreeze(run: Run, photos: Path) -> None:
    done = run("extract", photos, *TINY, "--layer", "layer9")
    assert done.code == 2
    assert "layer" in done.line
    run("extract", photos, *TINY)
    run("fit-head")
    refused = run("finetune", "--unfreeze", "layer9")
    assert refused.code == 2
    assert "layer" in refused.line


def test_a_knn_head_cannot_be_tuned(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY)
    name = run("fit-head", "--solver", "knn", "--json").data["run"]
    done = run("finetune", name, "--unfreeze", "layer4")
    assert done.code == 2
    assert "kNN" in done.line


def test_weights_without_network_or_package(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("extract", photos, "--backbone", "timm:test_resnet")
    assert done.code == 1
    assert "--weights" in done.line
    packaged = run("extract", photos, "--backbone", "timm:resnet18", "--weights", "packaged")
    assert packaged.code in (1, 2)
    assert "tf_efficientnet_lite0" in packaged.line


def test_a_place_that_cannot_be_written(run: Run, photos: Path) -> None:
    Path("file").touch()
    assert run("extract", photos, *TINY, "--cache-dir", "file/cache").code == 74
    run("extract", photos, *TINY)
    assert run("fit-head", "--l2", 0.1, "--runs-dir", "file/runs").code == 74


def test_a_full_disk_is_found_before_the_start(photos: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is checked against free space before the first image is decoded."""
    import shutil

    real = shutil.disk_usage

    def nearly_full(path: str) -> object:
        return real(path)._replace(free=4096)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    done = run("extract", photos, *TINY)
    assert done.code == 74
    assert "free" in done.line


def test_a_device_that_is_not_there(run: Run, photos: Path) -> None:
    done = run("extract", photos, *TINY, "--device", "cuda:7")
    assert done.code == 2
    assert "cpu" in done.line


def test_sigterm_commits_and_resumes(run: Run, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    photos = write_photos(tmp_path / "many", 400)
    process = start("extract", photos, *TINY, "--batch-size", 4, "--shard-rows", 64, "--json")
    shards = tmp_path / "work" / "cache" / "spaces"
    deadline = time.monotonic() + 120
    while not list(shards.glob("*/shards/*.h5")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    stopped = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert time.monotonic() - stopped < 5
    assert '"Stopped"' in out
    resumed = run("extract", photos, *TINY, "--batch-size", 4, "--json").data
    assert resumed["reused"] >= 64
    assert resumed["computed"] + resumed["reused"] == 1200
    assert resumed["rows"] == 1200


def test_models_and_layers(run: Run) -> None:
    names = run("models", "*resnet18*", "--json").data["models"]
    assert {"timm:resnet18", "torchvision:resnet18"} <= set(names)
    layers = run("layers", "timm:resnet18", "--json").data["layers"]
    assert layers[-1] == {"name": "layer4", "parameters": 8393728, "shape": [512, 7, 7]}


def test_only_the_first_and_the_third_ctrl_c_break_in(run: Run) -> None:
    run("--version")  # sets the handlers; the fixture puts the old ones back
    for breaks in (True, False, True):
        with pytest.raises(KeyboardInterrupt) if breaks else nullcontext():
            signal.raise_signal(signal.SIGINT)


def test_no_model_of_that_name_is_one_line(run: Run) -> None:
    done = run("models", "resnetty18")
    assert done.code == 2
    assert "no model matches 'resnetty18'" in done.line

"""advise on real image files: digits with real weights, and the command."""

from __future__ import annotations

import json
import shlex
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import embedpipe as ep
from embedpipe.runs import list_runs
from tests.conftest import TINY, Run, write_photos

pytestmark = pytest.mark.filterwarnings("ignore:newton has not converged")  # at the smallest l2, which is not chosen
LITE0 = {"weights": "packaged", "image_size": 64, "layer": ("penultimate", "all")}
FIELDS = {"action", "layer", "reason", "evidence", "expected_gain", "expected_gain_ci95", "cost_minutes", "commands"}
ACTIONS = {"linear-head", "earlier-layer", "several-layers", "finetune", "finetune-all", "more-data"}


def write_digits(folder: Path, counts: dict[str, int], *, wrong: float = 0.0) -> Path:
    """Write digits into <split>/<digit>/; a share of the labels of train and val is wrong."""
    rng, digits = np.random.default_rng(0), load_digits()
    numbers = iter(rng.permutation(len(digits.target)).tolist())
    for split, count in counts.items():
        for number in islice(numbers, count):
            label = int(digits.target[number])
            if split != "test" and rng.random() < wrong:
                label = (label + int(rng.integers(1, 10))) % 10
            path = folder / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.pad((digits.images[number] * (255 / 16)).round().astype(np.uint8), 1)
            Image.fromarray(pixels).save(path)
    return folder


class Pixels:
    """RGB image -> float32 (3, H, W)."""

    def to_dict(self) -> dict[str, str]:
        return {"scale": "1/255"}

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255


def advice_on(data: Path) -> ep.Advice:
    features = ep.extract(data, "timm:tf_efficientnet_lite0", cache_dir=data.parent / "cache", **LITE0)
    return ep.advise(features, runs_dir=data.parent / "runs", epochs=1)


def test_few_digits_want_earlier_layers(tmp_path: Path) -> None:
    done = advice_on(write_digits(tmp_path / "digits", {"train": 80, "val": 40}))
    assert done.action in ("earlier-layer", "several-layers"), done.evidence.leaked
    assert done.chosen.expected_gain is not None
    assert done.chosen.expected_gain > 3
    assert "blocks.4" in done.commands[0]
    assert done.evidence.best.layers != ("penultimate",)
    assert done.evidence.n_judged == 120
    costs = {one.action: one.cost_minutes for one in done.alternatives}
    assert 0 < costs["finetune"] <= 2 * costs["finetune-all"]


def test_wrong_labels_are_named_first(tmp_path: Path) -> None:
    done = advice_on(write_digits(tmp_path / "digits", {"train": 300, "val": 100}, wrong=0.2))
    assert done.action == "fix-labels"
    assert 0.12 < done.evidence.wrong_labels.share < 0.3
    digits = load_digits().target
    named = [Path(path) for path in done.evidence.wrong_labels.paths]
    assert np.mean([int(path.parent.name) != digits[int(path.stem)] for path in named]) > 0.9
    assert done.commands[0].startswith("embedpipe audit digits-")


def test_copies_are_named_first(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", {"train": 60, "val": 40, "test": 40})
    for path in sorted((data / "test").rglob("*.png"))[:10]:
        (data / "train" / path.parent.name / path.name).write_bytes(path.read_bytes())
    done = advice_on(data)
    assert done.action == "fix-leaks"
    assert len(done.evidence.leaked.paths) == 10
    assert done.evidence.n_judged == 110  # test is not among them
    assert all("/test/" in path for path in done.evidence.leaked.paths)


def test_the_command_extracts_what_is_lacking_and_keeps_the_splits(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY, "--val-fraction", 0.4)
    before = run("fit-head", "--json").data["metrics"]["val"]["n"]
    ended = run("advise", "--epochs", 1, "--json")
    assert "extracting all layers" in ended.err
    data = ended.data
    assert FIELDS | {"alternatives", "verify", "notes", "run", "dataset"} <= set(data)
    assert {data["action"], *(one["action"] for one in data["alternatives"])} >= ACTIONS
    assert data["evidence"]["n_val"] == before == run("fit-head", "--json").data["metrics"]["val"]["n"]
    assert data["verify"] is None
    folder = Path("runs") / data["run"]
    assert json.loads((folder / "advice.json").read_text()) == data
    assert json.loads((folder / "run.json").read_text())["verb"] == "advise"
    again = run("advise", "--epochs", 1)
    assert "extracting" not in again.err
    assert "advice: " in again.out
    assert data["evidence"]["knn"] == ep.advise(epochs=1).evidence.knn
    lines = data["commands"] + [line for one in data["alternatives"] for line in one["commands"]]
    for line in dict.fromkeys(lines):
        program, *words = shlex.split(line)
        assert program == "embedpipe"
        ended = run(*words, "--json") if words[0] != "advise" else None
        assert ended is None or ended.code == 0, line
        assert words[0] != "extract" or ended is None or ended.data["computed"] == 0
    elsewhere = run("advise", "--epochs", 1, "--runs-dir", "elsewhere", "--json").data["alternatives"]
    for line in [line for one in elsewhere for line in one["commands"]]:
        assert ("--runs-dir elsewhere" in line) is not line.startswith("embedpipe extract")


def test_verify_tries_all_and_compares_on_val_where_there_is_no_test(run: Run, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("val", 1)):
        write_photos(tmp_path / "photos" / split, seed=seed)
    run("extract", tmp_path / "photos", *TINY, "--layer", "penultimate", "--layer", "all")
    runs = len(list_runs(Path("runs")))
    ended = run("advise", "--verify", "--epochs", 1, "--json")
    found = ended.data["verify"]
    assert found["split"] == "val"
    assert {one["action"] for one in found["tried"]} == ACTIONS - {"more-data"}
    assert found["tried"][0]["action"] == ended.data["action"]
    assert found["right"] is not any(one["difference_ci95"][0] > 0 for one in found["tried"][1:])
    assert all((Path("runs") / one["run"]).is_dir() for one in found["tried"])
    assert len(list_runs(Path("runs"))) > runs


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nothing", "nothing has been extracted"),
        ("unlabelled", "no labels"),
        ("one class", "has 1 class"),
        ("epochs", "--epochs 0, expected 1 or more"),
    ],
)
def test_one_line_for_what_cannot_be_advised_on(run: Run, tmp_path: Path, kind: str, said: str) -> None:
    photos = write_photos(tmp_path / "photos", classes=("red",) if kind == "one class" else ("red", "blue"))
    if kind != "nothing":
        run("extract", photos / "red" if kind == "unlabelled" else photos, *TINY)
    ended = run("advise", *(["--epochs", 0] if kind == "epochs" else []))
    assert ended.code == 2
    assert said in ended.line


def test_a_python_backbone_whose_layers_have_no_name_is_judged_by_what_is_cached(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    backbone = ep.load_backbone(module, transform=Pixels())
    features = ep.extract(write_photos(tmp_path / "photos"), backbone, cache_dir=tmp_path / "cache")
    done = ep.advise(features, runs_dir=tmp_path / "runs")
    assert [one.layers for one in done.evidence.layers] == [("penultimate",)]

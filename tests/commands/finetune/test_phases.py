"""Gradual unfreezing: phases one after the other, from the best state before, resumable within any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import embedpipe as ep
from embedpipe.errors import Stopped, UsageError
from tests.commands.finetune.conftest import same, stop_at, weights
from tests.conftest import Run

SCHEDULE: list[dict[str, Any]] = [
    {"unfreeze": "none", "epochs": 1, "head_lr": 0.1},
    {"unfreeze": ["layer4"], "epochs": 2, "lr": 0.01, "optimizer": "sgd"},
    {"unfreeze": "layer3.*", "epochs": 1, "lr": 0.001, "patience": 1},
]
FILE = """
- {unfreeze: none, epochs: 1, head-lr: 0.1}
- {unfreeze: [layer4], epochs: 2, lr: 1e-2, optimizer: sgd}
- {unfreeze: layer3.*, epochs: 1, lr: 0.001, patience: 1}
"""


def test_phases_follow_each_other(head: ep.Classifier) -> None:
    before = dict(head.backbone.module.model.state_dict())
    first = ep.finetune(head, batch_size=8, schedule=SCHEDULE[:1])
    assert first.report["unfrozen"] == ["head.weight", "head.bias"]
    whole = ep.finetune(head, batch_size=8, schedule=SCHEDULE)
    assert [epoch["epoch"] for epoch in whole.report["epochs"]] == [0, 1, 2, 3, 4]
    alone = first.report["epochs"][1]["train_loss"]  # behind another cut: as near as rounding is
    assert whole.report["epochs"][1]["train_loss"] == pytest.approx(alone, rel=1e-5)
    assert any("layer3" in name for name in whole.report["unfrozen"])
    assert not any("layer2" in name for name in whole.report["unfrozen"])
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in before.items() if "layer2" in name)
    best = whole.report["epochs"][whole.report["best_epoch"]]
    assert whole.report["metrics"]["val"]["log_loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert best["val_accuracy"] == max(epoch["val_accuracy"] for epoch in whole.report["epochs"])


def test_every_epoch_has_an_order_of_its_own(head: ep.Classifier) -> None:
    """With rates of 0, its loss tells which images were left out."""
    still: dict[str, Any] = {"batch_size": 16, "lr": 0.0, "head_lr": 0.0}
    phases = ep.finetune(head, schedule=[{"unfreeze": "none", "epochs": 1}] * 3, **still).report["epochs"]
    whole = ep.finetune(head, unfreeze="none", epochs=3, **still).report["epochs"]
    assert [one["train_loss"] for one in phases] == [one["train_loss"] for one in whole]
    assert len({one["train_loss"] for one in whole}) == 4


@pytest.mark.parametrize("step", [1, 4, 8, 11])
def test_a_stop_in_any_phase_goes_on_to_the_same_bits(head: ep.Classifier, step: int) -> None:
    whole = ep.finetune(head, batch_size=8, schedule=SCHEDULE, ema=0.5)
    with pytest.raises(Stopped):
        ep.finetune(head, batch_size=8, schedule=SCHEDULE, ema=0.5, progress=stop_at(step, Stopped("now")))
    resumed = ep.finetune(resume=True)
    assert same(resumed, whole)
    for one in ("best_epoch", "best_of", "unfrozen", "metrics"):
        assert resumed.report[one] == whole.report[one]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"unfreze": "layer4"}, "unknown key 'unfreze' in phase 1; did you mean unfreeze"),
        ({"batch_size": 3}, "unknown key 'batch_size'"),
        ({"epochs": 1}, "no layer to unfreeze"),
        ({"unfreeze": "layer4", "epochs": 0}, "--epochs is 0"),
        ("layer4", "expected a list of phases"),
    ],
    ids=str,
)
def test_schedules_that_make_no_sense(head: ep.Classifier, phase: Any, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        ep.finetune(head, schedule=[phase])
    assert message in str(refused.value)


def test_a_schedule_from_a_file(head: ep.Classifier, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    where = ("--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache", "--json")
    file = tmp_path / "phases.yaml"
    file.write_text(FILE)
    told = run("finetune", "--batch-size", 8, "--schedule", file, *where).data
    assert told["options"]["schedule"][1]["lr"] == 0.01
    monkeypatch.chdir(tmp_path)
    wanted = ep.finetune(head, batch_size=8, schedule=SCHEDULE).report
    assert [epoch["val_loss"] for epoch in told["epochs"]] == [epoch["val_loss"] for epoch in wanted["epochs"]]
    for wrong in ("- {epochs: many}", "unfreeze: layer4", "- {unfreez: all}", "- [", ""):
        file.write_text(wrong)
        ended = run("finetune", "--schedule", file, *where)
        assert ended.code == 2, wrong
        assert "--" in ended.line

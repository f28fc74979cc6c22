"""Two processes of torchrun train as one does with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import embedpipe as ep
from embedpipe.commands.finetune._training import check_ranks
from embedpipe.errors import UsageError
from embedpipe.runs import list_runs
from embedpipe.training import Ranks
from tests.commands.finetune.conftest import weights

OPTIONS = ["--unfreeze", "layer4", "--epochs", 2, "--batch-size", 8, "--class-weight", "balanced", "--workers", 1]


def torchrun() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "embedpipe", "finetune", *OPTIONS, "--device", "cpu", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=120)


def test_two_processes_are_one(head: ep.Classifier) -> None:
    alone = ep.finetune(
        head, unfreeze="layer4", epochs=2, batch_size=8, class_weight="balanced", workers=1, device="cpu"
    )
    ended = torchrun()
    assert ended.returncode == 0, ended.stderr
    [line] = ended.stdout.splitlines()
    told: dict[str, Any] = json.loads(line)["data"]
    together = ep.Classifier.load(Path(told["folder"]))
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], tensor, rtol=1e-4, atol=1e-4)
    for one, other in zip(told["epochs"], alone.report["epochs"], strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-4)
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    assert sorted(run.name.split("-")[2] for run in list_runs(Path("runs"))) == ["finetune", "finetune", "fit"]
    assert list(Path("runs").glob(".*")) == []


@pytest.mark.parametrize("wrong", [{"bn": "train"}, {"batch_size": 7}], ids=str)
def test_what_two_processes_cannot_do(wrong: dict[str, Any]) -> None:
    options = {"unfreeze": ["layer4"], "bn": "affine", "batch_size": 8, "schedule": None, **wrong}
    check_ranks(options, Ranks())
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        check_ranks(options, Ranks(0, 2))

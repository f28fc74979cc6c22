"""What each option does to a run, on a real small model and real files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import embedpipe as ep
from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, UsageError
from embedpipe.runs import list_runs
from tests.commands.finetune.conftest import same
from tests.conftest import Run, write_photos

FAST: dict[str, Any] = {"unfreeze": "layer3", "epochs": 1, "batch_size": 8, "lr": 1e-2}
STILL = ("--epochs", 9, "--patience", 1, "--lr", 0, "--head-lr", 0)
CHANGES: list[dict[str, Any]] = [
    *({"optimizer": "sgd"}, {"layer_decay": 0.5}, {"l2_sp": 1.0}, {"clip_norm": 1e-3}, {"label_smoothing": 0.3}),
    *({"mixup": 0.5}, {"cutmix": 1.0}, {"precision": "bf16"}, {"accumulate": 2}, {"init": "random"}),
    *({"augment": "flip"}, {"augment": "standard"}, {"augment": "strong"}, {"weight_decay": 10.0}),
]


def test_every_option_changes_the_weights(head: ep.Classifier) -> None:
    """And the report says so."""
    plain = ep.finetune(head, **FAST)
    for option in CHANGES:
        other = ep.finetune(head, **FAST, **option)
        assert other.report["options"] == {**plain.report["options"], **option}
        losses = [tuned.report["epochs"][1]["train_loss"] for tuned in (plain, other)]
        assert losses[0] != losses[1] or not same(plain, other), option


def test_activations_computed_twice_change_nothing(head: ep.Classifier) -> None:
    plain, twice = ep.finetune(head, **FAST), ep.finetune(head, **FAST, grad_checkpointing=True)
    assert plain.report["epochs"][1]["train_loss"] == pytest.approx(twice.report["epochs"][1]["train_loss"], rel=1e-5)
    assert not twice.backbone.module.model.grad_checkpointing


def test_a_random_head_starts_at_chance(head: ep.Classifier) -> None:
    fitted, random = ep.finetune(head, **FAST), ep.finetune(head, **FAST, init="random")
    assert fitted.report["epochs"][0]["val_loss"] < random.report["epochs"][0]["val_loss"]
    assert random.report["handoff_max_abs_diff"] < 1e-4


def test_the_sweep_of_wise_ft_ends_at_both_ends(head: ep.Classifier) -> None:
    tuned = ep.finetune(head, **FAST, wise_ft=True)
    sweep = tuned.report["wise_ft"]["sweep"]
    assert [one["alpha"] for one in sweep] == pytest.approx([k / 10 for k in range(11)])
    epochs, best = tuned.report["epochs"], tuned.report["best_epoch"]
    assert sweep[0]["val_loss"] == pytest.approx(epochs[0]["val_loss"], rel=1e-6)
    assert sweep[-1]["val_loss"] == pytest.approx(epochs[best]["val_loss"], rel=1e-6)
    assert tuned.report["wise_ft"]["chosen"] == 1.0
    assert tuned.report["metrics"]["val"]["log_loss"] == pytest.approx(sweep[-1]["val_loss"], rel=1e-6)
    chosen = ep.finetune(head, **FAST, wise_ft="auto").report
    best_loss = min((-one["val_accuracy"], one["val_loss"]) for one in sweep)[1]
    assert chosen["metrics"]["val"]["log_loss"] == pytest.approx(best_loss, rel=1e-6)


def test_a_loss_that_breaks_leaves_the_best_state_as_a_run(head: ep.Classifier) -> None:
    with pytest.raises(EmbedpipeError, match=r"became (nan|inf) in epoch 1; .* holds epoch 0, the best one before"):
        ep.finetune(head, **{**FAST, "unfreeze": "all", "lr": 1e6, "head_lr": 1e6})
    [run] = [folder for folder in list_runs(Path("runs")) if "finetune" in folder.name]
    kept = ep.Classifier.load(run)
    assert "in epoch 1" in kept.report["stopped"]
    assert kept.report["metrics"]["val"]["log_loss"] == pytest.approx(
        head.report["metrics"]["val"]["log_loss"], abs=1e-4
    )
    assert list(Path("runs").glob(".*")) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "fp16", "device": "cpu"}, "fp16 on cpu"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"accumulate": 0}, "--accumulate is 0"),
    ],
)
def test_what_cannot_be(head: ep.Classifier, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ep.finetune(head, **{**FAST, **wrong})
    assert list(Path("runs").glob("*finetune*")) == []


def test_noise_was_removed(head: ep.Classifier, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--noise 0.1 was removed"):
        ep.finetune(head, **FAST, noise=0.1)
    with pytest.warns(EmbedpipeWarning, match="--noise is no longer used"), pytest.raises(UsageError, match="unfreeze"):
        ep.finetune(head, noise=0.0)
    where = ["--unfreeze", "none", "--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache", "--json"]
    assert run("finetune", "--noise", 0.1, *where).code == 2
    warned = run("finetune", "--noise", 0, "--epochs", 1, *where).envelope["warnings"]
    assert [text for text in warned if "--noise is no longer used" in text]
    (tmp_path / "noise.yaml").write_text("finetune: {noise: 0.1}")
    assert run("finetune", "--config", tmp_path / "noise.yaml", *where).code == 2
    monkeypatch.setenv("EMBEDPIPE_FINETUNE_NOISE", "0.1")
    assert "--noise 0.1 was removed" in run("finetune", *where).line


def test_models_that_cannot_checkpoint_and_transforms_of_ones_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    class Thumbnail:
        def __call__(self, image: Any) -> torch.Tensor:
            return torch.tensor(list(image.resize((16, 16)).tobytes()), dtype=torch.float32).reshape(3, 16, 16) / 255

        def to_dict(self) -> dict[str, Any]:
            return {"thumbnail": 16}

    head = ep.fit_head(ep.extract("photos", ep.load_backbone(own, transform=Thumbnail(), image_size=16)), l2=0.1)
    with pytest.raises(UsageError, match="--grad-checkpointing"):
        ep.finetune(head, **{**FAST, "unfreeze": "all"}, grad_checkpointing=True)
    with pytest.raises(UsageError, match="--augment standard of a backbone with a transform of your own"):
        ep.finetune(head, **{**FAST, "unfreeze": "all"}, augment="standard")


def test_where_no_epoch_is_better_it_says_what_to_try(head: ep.Classifier, run: Run, tmp_path: Path) -> None:
    where = ["--cache-dir", tmp_path / "cache", "--runs-dir", tmp_path / "runs"]
    told = "no epoch is better on val than the starting weights: try --lr 0.2 instead of 2"
    wild = run("finetune", "--unfreeze", "layer4", "--epochs", 1, "--lr", 2, *where)
    assert "best epoch 0 of 1" in wild.out
    assert told in wild.out


def test_on_the_command_line(head: ep.Classifier, run: Run, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")
    where = ("--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache", "--json")
    tuned = run("finetune", "--unfreeze", "layer4", "--epochs", 1, "--wise-ft", *where).data
    assert len(tuned["wise_ft"]["sweep"]) == 11
    text = run("finetune", "--unfreeze", "layer4", "--wise-ft", "auto", *STILL, *where[:-1])
    assert text.out.count("kept") == 1
    assert "stopped by --patience" in text.out
    for wrong in (
        ("--wise-ft", "best"),
        ("--optimizer", "adam"),
        ("--mixup", "a"),
        ("--resume",),
        ("--layer-decay", 2),
    ):
        ended = run("finetune", "--unfreeze", "layer4", *wrong, *where)
        assert ended.code == 2, wrong
        assert ended.line

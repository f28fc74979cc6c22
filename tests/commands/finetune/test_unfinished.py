"""Unfinished runs: hidden until they are complete, taken up by name, with the options they began with."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import embedpipe as ep
from embedpipe.errors import CacheBusy, Interrupted, ModelMismatch, Stopped, UsageError
from embedpipe.runs import find_unfinished, latest_run, list_runs
from tests.commands.finetune.conftest import same, stop_at, weights

RUNS = Path("runs")
OPTIONS: dict[str, Any] = {"unfreeze": "layer4", "epochs": 2, "batch_size": 8, "lr": 1e-2, "augment": "strong"}


def stop(head: ep.Classifier | None, step: int = 4, **options: Any) -> str:
    """Break a fine-tuning off after a step; return its name."""
    with pytest.raises(Stopped) as stopped:
        ep.finetune(head, **{**OPTIONS, **options}, progress=stop_at(step, Stopped("now")))
    assert "embedpipe finetune --resume" in stopped.value.hint
    return str(stopped.value.run)  # type: ignore[attr-defined]


def test_a_run_goes_on_to_the_same_bits(head: ep.Classifier) -> None:
    whole = ep.finetune(head, **OPTIONS)
    name = stop(head)
    assert latest_run(RUNS, "finetune") == RUNS / whole.report["run"]
    assert find_unfinished(RUNS, "finetune") == find_unfinished(RUNS, "finetune", name.rsplit("-", 1)[-1]) == name
    resumed = ep.finetune(resume=True)
    assert same(resumed, whole)
    assert (resumed.report["run"], resumed.report["resumed"], whole.report["resumed"]) == (name, True, False)
    for report in (whole.report, resumed.report):
        report["epochs"] = [{**epoch, "seconds": 0} for epoch in report["epochs"]]  # type: ignore[index]
    assert resumed.report["epochs"] == whole.report["epochs"]
    assert resumed.report["metrics"] == whole.report["metrics"]
    assert list(RUNS.glob(".*")) == []
    with pytest.raises(UsageError, match="no unfinished runs"):
        ep.finetune(resume=True)


def test_a_run_is_stopped_again_and_again(head: ep.Classifier) -> None:
    whole = ep.finetune(head, **OPTIONS)
    stop(head, 1)
    for step in (2, 4, 5):
        with pytest.raises(Interrupted):
            ep.finetune(resume=True, progress=stop_at(step, KeyboardInterrupt()))
    resumed = ep.finetune(resume=True)
    assert same(resumed, whole)


def test_the_options_of_a_run_stay(head: ep.Classifier) -> None:
    name = stop(head)
    other = ep.fit_head(l2=0.5)
    for changed, told in (
        ({"lr": 0.5}, "--lr is 0.01 in the run, got 0.5"),
        ({"unfreeze": "all"}, r"--unfreeze is \['layer4'\]"),
    ):
        with pytest.raises(UsageError, match=f"cannot change options when resuming {name}: {told}"):
            ep.finetune(resume=True, **changed)
    with pytest.raises(UsageError, match=r"RUN is .* in the run, got"):
        ep.finetune(other, resume=True)
    assert ep.finetune(head, resume=name[:-2], **OPTIONS, workers=1).report["run"] == name


def test_the_latest_is_meant_or_the_one_named(head: ep.Classifier) -> None:
    first, second = stop(head), stop(head, seed=1)
    with pytest.raises(UsageError, match="2 unfinished runs of finetune"):
        find_unfinished(RUNS, "finetune", first[:4])
    with pytest.raises(UsageError, match="no unfinished runs of finetune in runs match 'x'") as none:
        ep.finetune(resume="x")
    assert first in none.value.hint
    latest = max(first, second)
    assert ep.finetune(resume=True).report["run"] == latest
    assert ep.finetune(resume=True).report["run"] == min(first, second)


def test_two_do_not_work_on_one_run(head: ep.Classifier) -> None:
    name = stop(head)
    holder = os.open(RUNS / f".unfinished-{name}", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(CacheBusy, match=f"another process works on the run {name}"):
        ep.finetune(resume=True)
    os.close(holder)
    assert ep.finetune(resume=True).report["run"] == name


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None, "old"], ids=str)
def test_a_checkpoint_that_cannot_be_read(head: ep.Classifier, content: Any) -> None:
    path = RUNS / f".unfinished-{stop(head)}" / "checkpoint.pt"
    if content == "old":
        torch.save({"format": 0}, path)
    else:
        path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ModelMismatch, match="is not a readable checkpoint"):
        ep.finetune(resume=True)


def restore(head: ep.Classifier, name: str, **changes: dict[str, Any]) -> None:
    """Put an unfinished run of the first format, stopped in epoch 2 of 3, into the runs folder; it starts from `head`."""
    stored = torch.load(Path(__file__).with_name(f"unfinished-{name}.pt"), weights_only=True)
    stored["options"]["run"] = str(head.folder.absolute() if head.folder else None)
    for part, values in changes.items():
        (stored["options"] if part == "options" else stored["source"]["activations"]).update(values)
    folder = RUNS / ".unfinished-20260101-120000-finetune-abcdef"
    folder.mkdir()
    torch.save(stored, folder / "checkpoint.pt")


@pytest.mark.parametrize(
    ("name", "source"),
    [("images", {"cache_activations": "off", "augment": "flip"}), ("activations", {"cache_activations": "on"})],
)
def test_a_run_of_an_earlier_version_resumes(head: ep.Classifier, name: str, source: dict[str, Any]) -> None:
    """It ends with the weights of an uninterrupted run. Its options hold the noise of 0 that was the default."""
    restore(head, name)
    steps: list[tuple[str, int, int]] = []
    resumed = ep.finetune(resume=True, progress=lambda *step: steps.append(step))
    assert min(done / total for what, done, total in steps if what == "finetune") > 1 / 3  # not from the beginning
    training = {"unfreeze": "none", "epochs": 3, "batch_size": 8, "lr": 1e-2, "head_lr": 0.1, "optimizer": "sgd"}
    whole = ep.finetune(head, **training, **source)
    assert resumed.report["resumed"]
    assert resumed.report["options"] == whole.report["options"]
    for key in ("train_loss", "val_loss"):
        losses = [[epoch[key] for epoch in tuned.report["epochs"]] for tuned in (resumed, whole)]
        assert losses[0][2:] == pytest.approx(losses[1][2:], rel=1e-3)  # another processor may round otherwise
    for weight, tensor in weights(whole).items():
        torch.testing.assert_close(
            weights(resumed)[weight], tensor, rtol=1e-3, atol=1e-4
        )  # from heads that rounding parts


@pytest.mark.parametrize(
    ("changes", "removed"),
    [({"options": {"noise": 0.5}}, "--noise 0.5"), ({"activations": {"packed": True}}, "packed activations")],
)
def test_a_run_with_removed_options_is_refused(
    head: ep.Classifier, changes: dict[str, dict[str, Any]], removed: str
) -> None:
    restore(head, "activations", **changes)
    with pytest.raises(ModelMismatch, match=f"cannot resume 20260101-120000-finetune-abcdef: it uses {removed}"):
        ep.finetune(resume=True)


def test_what_fails_before_the_first_checkpoint_leaves_nothing(head: ep.Classifier) -> None:
    with pytest.raises(UsageError):
        ep.finetune(head, unfreeze="layer9")
    assert [run.name for run in RUNS.iterdir()] == [run.name for run in list_runs(RUNS)]


def test_what_a_kill_after_the_last_rename_left_is_removed(head: ep.Classifier) -> None:
    done = ep.finetune(head, **OPTIONS).report["run"]
    left = RUNS / f".unfinished-{done}"
    left.mkdir()
    (left / "checkpoint.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="no unfinished runs"):
        ep.finetune(resume=True)
    ep.finetune(head, **OPTIONS)
    assert not left.exists()

"""A training that is broken off after any step and taken up again ends with the same bits."""

from __future__ import annotations

import copy
import io
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedpipe.errors import Stopped
from embedpipe.training import Plan, Score, Trained, train

X = torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0, 0, 0] > 0).long()
PLANS = [
    Plan(epochs=3, ema=0.9, mixup=0.4, cutmix=0.4, label_smoothing=0.1),
    Plan(epochs=3, optimizer="sgd", accumulate=2, l2_sp=0.1),
    Plan(epochs=3, precision="bf16", patience=1),
]


def network() -> nn.Sequential:
    """With randomness of its own, and statistics that move."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.Flatten(), nn.Linear(32, 2))


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
    for start in range(0, 24, 6):
        yield X[order[start : start + 6]], Y[order[start : start + 6]]


def run(net: nn.Module, plan: Plan, **options: Any) -> Trained:
    def validate() -> Score:
        with torch.inference_mode():
            logits = net(X)
        return Score(nn.functional.cross_entropy(logits, Y).item(), (logits.argmax(1) == Y).float().mean().item())

    groups = [{"params": list(net.parameters()), "lr": 0.05, "weight_decay": 0.01, "anchored": True}]
    return train(net, groups, batches, validate, plan=plan, steps=4, keep_eval=[], n_classes=2, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def stopped_at(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Stopped("now")

    return on_step


def written(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as it comes back from a file."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    read: dict[str, Any] = torch.load(stream, weights_only=True)
    return read


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.optimizer + plan.precision)
def test_the_same_bits_after_a_stop_at_any_step(plan: Plan) -> None:
    whole = network()
    wanted = run(whole, plan)
    states: list[dict[str, Any]] = []
    for step in range(1, 1 + 4 // plan.accumulate * plan.epochs):
        broken = network()
        try:
            run(broken, plan, on_step=stopped_at(step), checkpoint=lambda state: states.append(copy.deepcopy(state)))
        except Stopped:
            torch.manual_seed(99)  # another process
            again = network()
            found = run(again, plan, resume=written(states[-1]))
            assert same(again, whole)
            assert [(e.train_loss, e.val_loss, e.ema_val_loss) for e in found.history] == [
                (e.train_loss, e.val_loss, e.ema_val_loss) for e in wanted.history
            ]
            assert (found.best_epoch, found.best_of) == (wanted.best_epoch, wanted.best_of)


def test_a_signal_waits_for_the_step_to_be_whole() -> None:
    """It comes in the middle of a forward pass; the checkpoint holds the whole step, and goes on to the same bits."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped("now")

    plan, whole = PLANS[0], network()
    run(whole, plan)
    net, calls = network(), 0

    def forward(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += net.training
        if calls == 6 and net.training:
            signal.raise_signal(signal.SIGTERM)

    net.register_forward_pre_hook(forward)
    states: list[dict[str, Any]] = []
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            run(net, plan, checkpoint=lambda state: states.append(copy.deepcopy(state)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (states[-1]["epoch"], len(states[-1]["losses"])) == (2, 2)
    again = network()
    run(again, plan, resume=written(states[-1]))
    assert same(again, whole)


def test_a_checkpoint_is_written_within_long_epochs() -> None:
    seen: list[tuple[int, int]] = []

    def checkpoint(state: dict[str, Any]) -> None:
        seen.append((state["epoch"], len(state["losses"])))

    run(network(), Plan(epochs=1), checkpoint=checkpoint, checkpoint_s=0.0)
    assert seen == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]

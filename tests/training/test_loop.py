"""The loop on a network of one layer: its schedule, its best epoch, and what it does when the loss breaks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from embedpipe.training import Plan, Score, train

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 2)


def groups(net: nn.Module, lr: float = 0.1) -> list[dict[str, object]]:
    return [{"params": list(net.parameters()), "lr": lr, "weight_decay": 0.0}]


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, 24, 6):
        yield X[start : start + 6], Y[start : start + 6]


class Judge:
    """Answers with the scores given, and keeps the weights that it saw."""

    def __init__(self, net: nn.Linear, accuracies: Sequence[float], losses: Sequence[float] = ()) -> None:
        self.net, self.seen = net, list[Tensor]()
        self.scores = iter([Score(loss, a) for a, loss in zip(accuracies, losses or [1.0] * 99, strict=False)])

    def __call__(self) -> Score:
        assert not self.net.training
        self.seen.append(self.net.weight.detach().clone())
        return next(self.scores)


@pytest.mark.parametrize(
    ("accuracies", "losses", "best"),
    [((0.5, 0.9, 0.7), (), 1), ((0.5, 0.7, 0.9), (), 2), ((0.9, 0.8, 0.7), (), 0), ((0.5, 0.9, 0.9), (1, 0.5, 0.4), 2)],
)
def test_the_best_epoch_is_what_stays(accuracies: Sequence[float], losses: Sequence[float], best: int) -> None:
    net = network()
    judge = Judge(net, accuracies, losses)
    trained = train(net, groups(net), batches, judge, plan=Plan(epochs=2), steps=4, keep_eval=[])
    assert [epoch.val_accuracy for epoch in trained.history] == list(accuracies)
    assert (trained.best_epoch, trained.best_of) == (best, "weights")
    assert len({weight.numpy().tobytes() for weight in judge.seen}) == 3
    assert torch.equal(net.weight, judge.seen[best])
    assert not net.training


def test_the_rate_warms_up_and_falls_as_a_cosine() -> None:
    net = network()
    parameters = groups(net, lr=0.5)
    rates: list[float] = []
    train(
        net,
        parameters,
        batches,
        Judge(net, [0.0] * 9),
        plan=Plan(epochs=5),
        steps=4,
        keep_eval=[],
        on_step=lambda done: rates.append(float(parameters[0]["lr"])),  # type: ignore[arg-type]
    )
    expected = [1.0] + [0.5 * (1 + math.cos(math.pi * k / 18)) for k in range(19)]  # two steps of 20 are warm-up
    assert rates == pytest.approx([0.5 * factor for factor in expected])


def test_the_loss_is_weighted_by_class() -> None:
    losses = []
    for weight in (None, torch.tensor([1.0, 0.0])):
        net = network()
        [_, epoch] = train(
            net,
            groups(net, lr=0),
            batches,
            Judge(net, [0, 0]),
            plan=Plan(epochs=1),
            steps=4,
            keep_eval=[],
            class_weight=weight,
        ).history
        losses.append(epoch.train_loss)
        wanted = [nn.functional.cross_entropy(net(x), y, weight=weight).item() for x, y in batches(1)]
        assert epoch.train_loss == pytest.approx(sum(wanted) / 4)
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_ends_in_the_best_state() -> None:
    net = network()
    judge = Judge(net, [0.5, 0.9, 0.1])

    def broken(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(epoch)
        if epoch == 2:
            yield torch.full((1, 5), float("inf")), Y[:1]

    trained = train(net, groups(net), broken, judge, plan=Plan(epochs=3), steps=5, keep_eval=[])
    assert trained.diverged == "the training loss became nan in epoch 2"
    assert len(trained.history) == 2
    assert torch.equal(net.weight, judge.seen[1])


def test_gradients_are_clipped() -> None:
    net = network()
    norms: list[float] = []

    def note(done: int) -> None:
        gradients = [p.grad.norm() for p in net.parameters() if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))

    huge = [(X * 1e4, 1 - Y)]
    train(
        net,
        groups(net, lr=0),
        lambda _: huge,
        Judge(net, [0, 0]),
        plan=Plan(epochs=1),
        steps=1,
        keep_eval=[],
        on_step=note,
    )
    assert norms == [pytest.approx(1.0, rel=1e-4)]

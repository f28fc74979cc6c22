"""One step is one step, however many images fit; and what each option does to it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, UsageError
from embedpipe.training import Plan, Ranks, Score, is_exempt_from_decay, layer_numbers, train
from embedpipe.training._plan import check_ranges
from embedpipe.training._steps import NotFinite, Stepper, make_optimizer, mixer

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
WEIGHT = torch.tensor([1.0, 2.0, 5.0])


class Small(nn.Module):
    """Has memory for so many images."""

    def __init__(self, room: int = 99) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.room, self.net = room, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        logits: Tensor = self.net(images)
        return logits


def step(net: nn.Module, batches: list[tuple[Tensor, Tensor]], weight: Tensor | None = None, **options: Any) -> float:
    groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.0, "anchored": True}]
    plan = Plan(optimizer="sgd", **options)
    stepper = Stepper(net, make_optimizer("sgd", groups), plan, n_classes=3, class_weight=weight, ranks=Ranks())
    return stepper.step(batches)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_batches_and_pieces_weigh_as_one_batch(weight: Tensor | None, smoothing: float) -> None:
    """Against torch's own mean over all images."""
    options: dict[str, Any] = {"label_smoothing": smoothing, "clip_norm": 0.0}
    whole, parts, cramped = Small(), Small(), Small(room=2)
    wanted = nn.functional.cross_entropy(whole(X), Y, weight=weight, label_smoothing=smoothing).item()
    assert step(whole, [(X, Y)], weight, **options) == pytest.approx(wanted, rel=1e-6)
    assert step(parts, [(X[:8], Y[:8]), (X[8:], Y[8:])], weight, **options) == pytest.approx(wanted, rel=1e-6)
    with pytest.warns(EmbedpipeWarning) as warned:
        assert step(cramped, [(X, Y)], weight, **options) == pytest.approx(wanted, rel=1e-6)
    assert [str(one.message).split(" images")[0] for one in warned] == ["12", "6", "3"]
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(cramped), weights(whole), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_at_all() -> None:
    with pytest.warns(EmbedpipeWarning), pytest.raises(EmbedpipeError, match="not even one image"):
        step(Small(room=0), [(X, Y)])


def test_a_gradient_that_is_not_finite_touches_no_weight() -> None:
    net = Small()
    net.net[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(net)
    with pytest.raises(NotFinite, match="the gradient became"):
        step(net, [(X, Y)])
    assert torch.equal(weights(net), before)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    net, seen = Small(), []
    net.net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step(net, [(X, Y)], precision="bf16")
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_fp16_leaves_out_a_step_whose_scaled_gradient_overflows() -> None:
    """The scale, 65536 at first, is halved, and the next step is taken."""
    net = Small()
    groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.0}]
    stepper = Stepper(
        net, torch.optim.SGD(groups), Plan(precision="fp16"), n_classes=3, class_weight=None, ranks=Ranks()
    )
    broken = net.net[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    before, loss = weights(net), stepper.step([(X, Y)])
    assert loss == pytest.approx(nn.functional.cross_entropy(net(X), Y).item(), rel=1e-2)
    assert torch.equal(weights(net), before)
    assert stepper.scaler.get_scale() == 32768
    broken.remove()
    stepper.step([(X, Y)])
    assert not torch.equal(weights(net), before)


def test_l2_sp_pulls_to_the_start() -> None:
    """Without a gradient from the loss, a parameter that was moved goes back by lr * l2_sp of the way."""
    net = Small()
    groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.0, "anchored": True}]
    stepper = Stepper(
        net, torch.optim.SGD(groups), Plan(l2_sp=2.0, clip_norm=0.0), n_classes=3, class_weight=None, ranks=Ranks()
    )
    start = weights(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
            parameter.register_hook(torch.zeros_like)
    stepper.step([(X, Y)])
    torch.testing.assert_close(weights(net), start + 0.8)


@pytest.mark.parametrize(("options", "softened"), [({}, False), ({"mixup": 0.5}, True), ({"cutmix": 1.0}, True)])
def test_mixing(options: dict[str, float], softened: bool) -> None:
    torch.manual_seed(0)
    images, y = mixer(Plan(**options), 3)(X, Y)  # type: ignore[arg-type]
    assert images.shape == X.shape
    assert torch.equal(images, X) is not softened
    assert (y.ndim == 2) is softened
    if softened:
        torch.testing.assert_close(y.sum(1), torch.ones(12))
        assert 0 < y.max(1).values.min() < 1


def test_layers_are_counted_from_the_input() -> None:
    vit = timm.create_model("test_vit", num_classes=0)
    numbers = layer_numbers(vit, [])
    assert numbers["patch_embed.proj.weight"] == 0
    assert numbers["blocks.1.attn.qkv.weight"] - numbers["blocks.0.attn.qkv.weight"] == 1
    assert numbers["norm.weight"] == max(numbers.values())
    resnet = torchvision.models.resnet18()
    numbers = layer_numbers(resnet, ["conv1", "layer1", "layer2", "layer3", "layer4"])
    assert [numbers[f"{n}.weight"] for n in ("conv1", "bn1", "layer1.0.conv1", "layer4.1.bn2")] == [0, 0, 1, 4]


def test_what_weight_decay_leaves_out() -> None:
    vit = timm.create_model("test_vit", num_classes=0)
    small = {name for name, p in vit.named_parameters() if is_exempt_from_decay(vit, name, p.ndim)}
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= small
    assert "blocks.0.attn.qkv.weight" not in small
    own = torchvision.models.swin_t()
    assert is_exempt_from_decay(own, "features.1.0.attn.relative_position_bias_table", 2)


def scored(plan: Plan, accuracies: list[float]) -> Any:
    net, scores = Small(), iter(accuracies)
    groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.0}]
    seen: list[Tensor] = []

    def validate() -> Score:
        seen.append(weights(net))
        return Score(1.0, next(scores))

    trained = train(net, groups, lambda _: [(X, Y)], validate, plan=plan, steps=1, keep_eval=[])
    return net, trained, seen


def test_patience() -> None:
    _, trained, _ = scored(Plan(epochs=9, patience=2), [0.5, 0.6, 0.6, 0.6, 1.0])
    assert [epoch.epoch for epoch in trained.history] == [0, 1, 2, 3]
    assert trained.best_epoch == 1


def test_the_average_is_judged_and_kept_where_it_is_better() -> None:
    net, trained, seen = scored(Plan(epochs=2, ema=0.9), [0.1, 0.2, 0.3, 0.4, 0.9])
    assert (trained.best_epoch, trained.best_of) == (2, "ema")
    assert trained.history[2].ema_val_accuracy == 0.9
    start, first, first_average, second, average = seen
    torch.testing.assert_close(first_average, first.lerp(start, 0.1))
    torch.testing.assert_close(average, second.lerp(first_average, 2 / 11))
    assert torch.equal(weights(net), average)
    plain = scored(Plan(epochs=2), [0.1, 0.2, 0.4])[2]
    assert all(torch.equal(one, other) for one, other in zip(plain, (start, first, second), strict=True))
    assert scored(Plan(epochs=1, ema=0.9), [0.1, 0.4, 0.4])[1].best_of == "weights"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"epochs": 0}, {"accumulate": 0}, {"patience": 0}, {"lr": -1.0}, {"mixup": float("nan")}),
        *({"ema": 1.0}, {"label_smoothing": 1.5}, {"layer_decay": 0.0}, {"layer_decay": 1.1}),
    ],
    ids=str,
)
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')} is"):
        check_ranges(wrong)

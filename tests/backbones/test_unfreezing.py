"""What trains and what stays in eval mode, by order of execution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embedpipe.backbones import frozen_modules, load_backbone, unfreeze_parameters
from embedpipe.errors import UsageError
from embedpipe.images import Transform


class Shuffled(nn.Module):
    """Registered in another order than it runs; parameters of its own, dropout on both sides of the
    cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.late_drop = nn.Dropout(0.5)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.early_drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.never = nn.Linear(2, 2)

    def forward(self, images):
        x = self.early_drop(self.first(images * self.scale))
        return self.late_drop(self.norm(self.second(x))).mean((2, 3))


@pytest.fixture
def shuffled():
    return load_backbone(Shuffled(), transform=Transform(crop_size=(8, 8), resize_size=8))


def owners(names) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def test_a_name_means_what_runs_from_there_on(shuffled) -> None:
    assert owners(unfreeze_parameters(shuffled, ["second"])) == {"norm", "second.0", "second.1"}
    assert owners(unfreeze_parameters(shuffled, ["second.1"])) == {"norm", "second.1"}
    assert owners(unfreeze_parameters(shuffled, ["norm"])) == {"norm"}
    assert owners(unfreeze_parameters(shuffled, ["first"])) == {"norm", "second.0", "second.1", "first.0", "first.1"}


def test_a_glob_means_exactly_what_it_matches(shuffled) -> None:
    assert unfreeze_parameters(shuffled, ["first.*"]) == (
        "first.0.weight",
        "first.0.bias",
        "first.1.weight",
        "first.1.bias",
    )
    assert unfreeze_parameters(shuffled, ["*.0.bias", "scale*"]) == ("scale", "second.0.bias", "first.0.bias")
    assert owners(unfreeze_parameters(shuffled, ["seco?d"])) == {"second.0", "second.1"}


def test_numbers_all_and_none(shuffled) -> None:
    assert [layer.name for layer in shuffled.layers] == ["first.0", "second.0"]
    assert unfreeze_parameters(shuffled, ["1"]) == unfreeze_parameters(shuffled, ["second"])
    assert unfreeze_parameters(shuffled, ["0"]) == unfreeze_parameters(shuffled, ["none"]) == ()
    everything = tuple(name for name, _ in shuffled.module.model.named_parameters())
    assert unfreeze_parameters(shuffled, ["all"]) == everything


def test_a_percentage_means_the_last_modules_to_run(shuffled) -> None:
    order = ["", "never", "first.0", "first.1", "second.0", "second.1", "norm"]  # as they start
    for percent, count in ((0, 0), (10, 1), (28, 2), (50, 4), (71, 5), (100, 7)):
        assert owners(unfreeze_parameters(shuffled, [f"{percent}%"])) == {*order[7 - count :]}


@pytest.mark.parametrize(
    "pattern", ["layer4x", "sec", "early_drop.x", "3", "never.zz", "zz*", "101%", "-1%", "x%", "nan%"]
)
def test_nothing_matched(shuffled, pattern: str) -> None:
    with pytest.raises(UsageError):
        unfreeze_parameters(shuffled, [pattern])


def test_nearest_names() -> None:
    backbone = load_backbone("test_resnet", weights="none")
    with pytest.raises(UsageError, match=r"did you mean 'layer4'|'layer4"):
        unfreeze_parameters(backbone, ["layer44"])


def test_resnet_and_vit() -> None:
    resnet = load_backbone("timm:resnet18", weights="none", image_size=64)
    assert {n.split(".")[0] for n in unfreeze_parameters(resnet, ["layer4"])} == {"layer4"}
    assert {n.split(".")[0] for n in unfreeze_parameters(resnet, ["2"])} == {"layer3", "layer4"}
    vit = load_backbone("test_vit", weights="none")
    names = unfreeze_parameters(vit, [vit.layers[-1].name])
    assert {n.split(".")[0] for n in names} == {"blocks", "norm"}
    assert not [n for n in names if "token" in n or "pos_embed" in n]
    torchvision = load_backbone("torchvision:vit_b_32", weights="none")
    last = unfreeze_parameters(torchvision, ["1"])
    assert "encoder.layers.encoder_layer_11.self_attention.out_proj.weight" in last
    assert "encoder.ln.weight" in last
    assert not [n for n in last if "layer_10" in n]


def modes(backbone, patterns) -> dict[str, bool]:
    backbone.module.train()
    for module in frozen_modules(backbone, unfreeze_parameters(backbone, patterns)):
        module.eval()
    return {name: module.training for name, module in backbone.module.model.named_modules()}


def test_frozen_layers_and_their_dropout_stay_in_eval_mode(shuffled) -> None:
    training = modes(shuffled, ["second"])
    assert not any(training[n] for n in ("first", "first.0", "first.1", "first.2", "early_drop", "never"))
    assert all(training[n] for n in ("second.0", "second.1", "second.2", "norm", "late_drop"))


def test_a_glob_leaves_frozen_what_lies_between(shuffled) -> None:
    training = modes(shuffled, ["first.*"])
    assert not any(training[n] for n in ("second.0", "second.1", "second.2", "norm"))
    assert all(training[n] for n in ("first.0", "first.1", "first.2"))


def test_nothing_unfrozen_means_all_in_eval_mode(shuffled) -> None:
    assert not any(modes(shuffled, ["none"]).values())


def test_statistics_of_frozen_batch_norms_do_not_move() -> None:
    backbone = load_backbone("test_resnet", weights="none")
    before = {k: v.clone() for k, v in backbone.module.model.state_dict().items()}
    modes(backbone, ["layer4"])
    backbone.module(torch.randn(4, 3, 160, 160))
    moved = {k.split(".")[0] for k, v in backbone.module.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"layer4"}


def test_a_backbone_trains_through_its_module(shuffled) -> None:
    names = unfreeze_parameters(shuffled, ["second"])
    for name in names:
        shuffled.module.model.get_parameter(name).requires_grad_(True)
    shuffled.module(torch.randn(2, 3, 8, 8)).sum().backward()
    graded = {n for n, p in shuffled.module.model.named_parameters() if p.grad is not None}
    assert graded == set(names)

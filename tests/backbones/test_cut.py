"""A backbone in two parts computes what the whole computes, in training too, or says why there is no cut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, cut_before, frozen_modules, load_backbone, unfreeze_parameters
from embedpipe.errors import UsageError
from embedpipe.images import Transform
from tests.backbones.test_penultimate import BIG, SMALLEST, QuickRandom, parameters, size_for

# Every stage but the first.
MODELS = {
    "timm:test_resnet": 64,
    "timm:test_byobnet": 64,
    "timm:regnetx_002": 64,
    "timm:test_efficientnet": 64,
    "timm:tf_efficientnet_lite0": 64,
    "timm:mobilenetv3_small_050": 64,
    "timm:test_convnext": 64,
    "timm:test_nfnet": 64,
    "timm:dla46x_c": 64,
    "timm:test_vit": None,
    "timm:deit_tiny_distilled_patch16_224": 64,
    "timm:swin_tiny_patch4_window7_224": 64,
    "timm:maxvit_pico_rw_256": 64,
    "timm:mixer_s32_224": 64,
    "timm:eva02_tiny_patch14_224": 56,
    "timm:test_vit_relpos": None,
    "timm:test_coatnet": None,
    "timm:pvt_v2_b0": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:googlenet": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:mnasnet0_5": 64,
    "torchvision:squeezenet1_1": 64,
}
LARGE = {
    "timm:beit_base_patch16_224": 64,
    "timm:xcit_nano_12_p8_224": 64,
    "torchvision:swin_t": 64,
    "torchvision:convnext_tiny": 64,
    "timm:densenet121": 64,
    "torchvision:vit_b_32": None,
    "torchvision:vgg11": 64,
    "torchvision:inception_v3": 96,
}
AS_BUILT = dict.fromkeys(("timm:crossvit_tiny_240", "timm:test_vit"))  # the size that the model is made for
REFUSED = [
    ("timm:cait_xxs24_224", "blocks_token_only.0", "needs the output of blocks;"),  # every such block reads the patches
    ("timm:crossvit_tiny_240", "blocks.2", "the first argument is not a tensor"),  # two streams
    ("timm:hrnet_w18_small", "transition1.0", "needs the output of layer1;"),
    ("timm:hrnet_w18_small", "stage2", "the first argument is not a tensor"),
    (
        "timm:test_resnet",
        "layer4.0.conv1",
        "needs the output of layer3; without it the features differ by",
    ),  # a residual
    ("timm:test_resnet", "conv1", "nothing runs before it"),
    ("torchvision:resnet18", "layer4.0.relu", "it runs 2 times"),
]


def random_backbone(name: str, size: int | None = None) -> Backbone:
    with QuickRandom():
        return load_backbone(name, weights="none", image_size=size)


def wrapped(module: nn.Module) -> Backbone:
    return load_backbone(module, transform=Transform(crop_size=(8, 8), resize_size=8))


def some_images(backbone: Backbone, count: int = 4) -> Tensor:
    return torch.randn((count, 3, *backbone.image_size), generator=torch.Generator().manual_seed(7))


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.detach().abs().max())))


@torch.no_grad()
def check(backbone: Backbone, layer: str) -> None:
    images = some_images(backbone)
    cut = backbone.cut(layer)
    activation = cut.trunk(images)
    assert activation.shape == (4, *cut.shape)
    assert_same(cut.tail(activation), backbone.module(images))


@pytest.mark.parametrize("name", MODELS)
def test_the_second_a_middle_and_the_last_stage_can_be_cut_off(name: str) -> None:
    backbone = random_backbone(name, MODELS[name])
    stages = [layer.name for layer in backbone.layers]
    for layer in dict.fromkeys((stages[1], stages[len(stages) // 2], stages[-1])):
        check(backbone, layer)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_stage_but_the_first_can_be_cut_off(name: str) -> None:
    backbone = random_backbone(name, MODELS[name])
    for layer in backbone.layers[1:]:
        check(backbone, layer.name)


@pytest.mark.parametrize("name", LARGE)
def test_the_last_stage_of_larger_models(name: str) -> None:
    backbone = random_backbone(name, LARGE[name])
    check(backbone, backbone.layers[-1].name)


@pytest.mark.parametrize(("name", "layer", "reason"), REFUSED)
def test_no_cut_without_the_reason(name: str, layer: str, reason: str) -> None:
    backbone = random_backbone(name, AS_BUILT.get(name, 64))
    with pytest.raises(UsageError, match=reason):
        backbone.cut(layer)


@pytest.mark.parametrize("layer", ["layer44", "", "fc.x"])
def test_unknown_layers(layer: str) -> None:
    with pytest.raises(UsageError, match="no layer"):
        random_backbone("timm:test_resnet", 64).cut(layer)


def test_the_feature_of_an_earlier_layer() -> None:
    backbone = load_backbone("timm:test_resnet", weights="none", image_size=64, layer="layer3")
    check(backbone, "layer2")
    with pytest.raises(UsageError, match="it runs 0 times"):
        backbone.cut("layer4")


class Faint(nn.Module):
    """What the last layer takes is not all that counts: the input of the one before is added, times zero today."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return (self.third(self.second(x)) + self.scale * x).mean((2, 3))


def test_a_tensor_that_crosses_counts_even_times_zero() -> None:
    backbone = wrapped(Faint())
    with pytest.raises(UsageError, match="needs the output of first; without it the features differ by 0"):
        backbone.cut("third")


class Skipping(nn.Module):
    """Runs its last layer for batches of at most three images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return (self.second(x) if len(images) <= 3 else x).mean((2, 3))


def test_a_trunk_whose_layer_does_not_run() -> None:
    cut = wrapped(Skipping()).cut("second")
    assert cut.trunk(torch.zeros(3, 3, 8, 8)).shape == (3, 3, 8, 8)
    with pytest.raises(RuntimeError, match="second did not run for these images"):
        cut.trunk(torch.zeros(4, 3, 8, 8))


class Noisy(nn.Module):
    """Dropout, BatchNorm and a module written into in place, on both sides of `second`; one ReLU serves both."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(images)) - 0.1)).mean((2, 3))


def training(backbone: Backbone, layer: str) -> tuple[str, ...]:
    """Put `layer` and what follows into training, as fine-tuning does."""
    unfrozen = unfreeze_parameters(backbone, [layer])
    for name in unfrozen:
        backbone.module.model.get_parameter(name).requires_grad_(True)
    backbone.module.train()
    for module in frozen_modules(backbone, unfrozen):
        module.eval()
    return unfrozen


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backbone.module.model.state_dict().items()}


def step(backbone: Backbone, features: Tensor) -> dict[str, Tensor]:
    """Return the gradients of one step, by parameter, and leave none."""
    features.square().sum().backward()
    named = dict(backbone.module.model.named_parameters())
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    backbone.module.zero_grad(set_to_none=True)
    return gradients


@pytest.mark.parametrize("make", [lambda: wrapped(Noisy()), lambda: random_backbone("timm:test_resnet", 64)])
def test_a_training_step_of_the_tail_is_that_of_the_whole(make) -> None:
    backbone = make()
    layer = backbone.layers[-1].name
    layer = "second" if layer.startswith("second") else layer
    images, before = some_images(backbone), state_of(backbone)
    cut = backbone.cut(layer)
    with torch.no_grad():
        activation = cut.trunk(images)
    kept = activation.clone()
    unfrozen = training(backbone, layer)
    torch.manual_seed(3)
    whole = backbone.module(images)
    expected, moved = step(backbone, whole), state_of(backbone)
    backbone.module.model.load_state_dict(before)
    backbone.module.requires_grad_(True)  # nothing but the cut keeps the trunk from a gradient
    torch.manual_seed(3)
    features = cut.tail(activation)
    assert_same(features, whole)
    got = step(backbone, features)
    assert set(got) == set(expected) == set(unfrozen)
    for name, gradient in got.items():
        assert_same(gradient, expected[name])
    for name, value in state_of(backbone).items():
        assert torch.equal(value, moved[name])
        assert torch.equal(value, before[name]) or name.startswith(layer)
    assert torch.equal(activation, kept)


def test_dropout_is_that_of_the_tail_alone() -> None:
    backbone = wrapped(Noisy())
    cut = backbone.cut("second")
    training(backbone, "second")
    activation = cut.trunk(some_images(backbone))
    assert torch.equal(activation, cut.trunk(some_images(backbone)))
    assert not torch.equal(cut.tail(activation), cut.tail(activation))
    cut.tail.eval()
    assert torch.equal(cut.tail(activation), cut.tail(activation))


def test_the_parts_are_the_backbone() -> None:
    backbone = random_backbone("timm:test_resnet", 64)
    training(backbone, "layer4")
    modes = [module.training for module in backbone.module.modules()]
    cut = backbone.cut("layer4")
    assert modes == [module.training for module in backbone.module.modules()]
    own = dict(backbone.module.named_parameters())
    for part in (cut.trunk, cut.tail):
        assert part.state_dict().keys() == backbone.module.state_dict().keys()
        assert all(p is own[name] for name, p in part.named_parameters())
        assert part.train().training
        assert not backbone.module.model.training


def test_what_ran_before_the_cut_is_left_as_it_was() -> None:
    backbone = random_backbone("timm:test_resnet", 64)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in backbone.module.modules()]
    cut = backbone.cut("layer4")
    with pytest.raises(RuntimeError):
        cut.tail(torch.zeros(1, 1, 1, 1))
    del cut
    assert not [name for name, m in backbone.module.named_modules() if "forward" in vars(m)]
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in backbone.module.modules()]


def test_threads_share_a_trunk() -> None:
    backbone = random_backbone("timm:test_resnet", 64)
    trunk = backbone.cut("layer3").trunk
    batches = [torch.randn(2, 3, 64, 64) for _ in range(16)]
    expected = [trunk(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, activation in zip(pool.map(trunk, batches), expected, strict=True):
            assert torch.equal(got, activation)


BEFORE = [
    ("timm:test_resnet", ["layer4"], "layer4"),
    ("timm:test_resnet", ["layer3", "layer4"], "layer3"),
    ("timm:test_resnet", ["layer4.0.conv2*"], "layer4"),
    ("timm:test_resnet", ["1"], "layer4"),
    ("timm:test_vit", ["blocks.4.mlp.fc2*", "norm*"], "blocks.4"),
    ("timm:test_vit", ["norm.*"], "norm"),
    ("timm:tf_efficientnet_lite0", ["blocks.6"], "blocks.6"),
    ("timm:cait_xxs24_224", ["1"], "blocks.23"),
    ("timm:hrnet_w18_small", ["final_layer"], "final_layer"),
]


@pytest.mark.parametrize(("name", "patterns", "layer"), BEFORE)
def test_the_latest_cut_before_what_moves(name: str, patterns: list[str], layer: str) -> None:
    backbone = random_backbone(name, AS_BUILT.get(name, 64))
    unfrozen = unfreeze_parameters(backbone, patterns)
    cut = cut_before(backbone, unfrozen)
    assert cut is not None
    assert cut.layer == layer
    images = some_images(backbone)
    assert_same(cut.tail(cut.trunk(images)), backbone.module(images))
    backbone.module.requires_grad_(True)
    reached = step(backbone, cut.tail(cut.trunk(images).detach()))
    assert set(unfrozen) <= set(reached)


def test_nothing_moves() -> None:
    assert cut_before(random_backbone("timm:test_resnet", 64), ()) is None


@pytest.mark.parametrize(
    ("name", "pattern"), [("test_resnet", "conv1"), ("test_vit", "pos_embed"), ("test_vit", "all")]
)
def test_no_cut_where_the_first_to_run_moves(name: str, pattern: str) -> None:
    backbone = random_backbone(f"timm:{name}")
    with pytest.raises(UsageError, match="cannot be cut"):
        cut_before(backbone, unfreeze_parameters(backbone, [pattern]))


class Tied(nn.Module):
    """The last layer's weight is the first one's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 3, 1)
        self.first = nn.Conv2d(3, 3, 1)
        self.first.weight = self.last.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images)).mean((2, 3))


def test_a_shared_parameter_moves_on_both_sides() -> None:
    backbone = wrapped(Tied())
    with pytest.raises(UsageError, match="first runs before it with unfrozen parameters"):
        cut_before(backbone, ["last.weight"])
    assert cut_before(backbone, ["last.bias"]).layer == "last"


NO_CUT = {"crossvit_tiny_240", "tnt_s_legacy_patch16_224", "nasnetalarge", "pnasnet5large"}  # two streams to the end


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST.values())
def test_one_of_each_timm_family(name: str) -> None:
    """The last stage of each can be fine-tuned from a cut."""
    if parameters(f"timm:{name}") > BIG:
        pytest.skip("too many parameters")
    backbone = random_backbone(f"timm:{name}", size_for(f"timm:{name}"))
    unfrozen = unfreeze_parameters(backbone, ["1"])
    if name in NO_CUT:
        with pytest.raises(UsageError, match="cannot be cut"):
            cut_before(backbone, unfrozen)
    else:
        cut = cut_before(backbone, unfrozen)
        images = some_images(backbone, 1)
        assert_same(cut.tail(cut.trunk(images)), backbone.module(images))

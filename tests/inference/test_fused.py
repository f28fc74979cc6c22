"""The fused graph: Winograd's convolutions against the direct sum, and what may share memory. Random weights: mechanics."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from embedpipe.backbones import Backbone, join, load_backbone
from embedpipe.errors import UsageError
from embedpipe.images import Transform
from embedpipe.inference import Fused, has_fused, tiled_share
from embedpipe.inference._fused import _Colours, fuse
from embedpipe.inference._pooling import Pooling
from embedpipe.inference._stem import Stem, is_stem
from embedpipe.inference._suiting import Places, suits
from embedpipe.inference._winograd import Winograd

SIZE = 3


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([32, 48, 96]),
    outputs=st.sampled_from([32, 80]),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    shift=st.booleans(),
    add=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_winograd_is_the_convolution(
    count: int, channels: int, outputs: int, height: int, width: int, shift: bool, add: bool, relu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images, weight = torch.randn(count, channels, height, width), torch.randn(outputs, channels, 3, 3)
    bias = torch.randn(outputs) if shift else None
    total = torch.randn(count, outputs, height, width).contiguous(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(
        images.double(), weight.double(), None if bias is None else bias.double(), padding=1
    )
    largest = expected.abs().max()
    expected = expected + total if add else expected
    expected = expected.relu() if relu else expected
    with torch.inference_mode():
        found = Winograd(weight, bias, tuple(images.shape), relu=relu)(images, total if add else None)
    assert (found - expected).abs().max() < 2e-5 * largest
    assert not add or found.data_ptr() == total.data_ptr()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_of_a_batch_are_the_batch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedpipe.inference._winograd.ROOM", 1)
    torch.manual_seed(0)
    images, weight = torch.randn(count, 32, 31, 31), torch.randn(32, 32, 3, 3)
    with torch.inference_mode():
        convolution = Winograd(weight, None, tuple(images.shape), relu=False)
        found = convolution(images)
    assert convolution._shape[0] < count * 64
    assert torch.allclose(found, nn.functional.conv2d(images, weight, padding=1), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 3),
    channels=st.sampled_from([16, 48]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_pooling_is_torch_s(count: int, channels: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.randn(count, channels, height, width)
    images[torch.rand(images.shape) < 0.02] = float("nan")
    expected = nn.functional.max_pool2d(images, 3, 2, 1)
    assert torch.equal(Pooling()(images).nan_to_num(99.0), expected.nan_to_num(99.0))


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 3),
    outputs=st.sampled_from([64, 128]),
    height=st.integers(1, 7),
    width=st.integers(1, 11),
    shift=st.booleans(),
    relu=st.booleans(),
    pools=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_stem_is_the_convolution(
    count: int, outputs: int, height: int, width: int, shift: bool, relu: bool, pools: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images, weight = torch.randn(count, 3, 8 * height, 8 * width), torch.randn(outputs, 3, 7, 7)
    bias = torch.randn(outputs) if shift else None
    wide = None if bias is None else bias.double()
    expected = nn.functional.conv2d(images.double(), weight.double(), wide, stride=2, padding=3)
    largest = expected.abs().max()
    expected = expected.relu() if relu else expected
    stem = Stem(weight, bias, relu=relu)
    stem.pools = pools
    found = stem(images)
    assert (found - (nn.functional.max_pool2d(expected, 3, 2, 1) if pools else expected)).abs().max() < 5e-6 * largest


def test_which_convolutions_are_a_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = "embedpipe.inference._stem._has_wide_registers"
    monkeypatch.setattr(capability, lambda: True)
    weight, size, places = torch.empty(64, 3, 7, 7), (1, 3, 224, 224), Places((2, 2), (3, 3))
    assert is_stem(weight, places, size)
    assert not is_stem(weight, Places((2, 2), (2, 2)), size)
    assert not is_stem(weight, places, (1, 3, 224, 228))
    assert not is_stem(torch.empty(96, 3, 7, 7), places, size)
    assert not is_stem(torch.empty(64, 1, 7, 7), places, (1, 1, 224, 224))
    assert not is_stem(torch.empty(64, 3, 5, 5), places, size)
    monkeypatch.setattr(capability, lambda: False)
    assert not is_stem(weight, places, size)


def test_what_is_not_a_number_stays_so_where_it_is_rectified() -> None:
    images, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    images[0, 3, 4, 4] = float("nan")
    for total in (None, torch.zeros(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)):
        found = Winograd(weight, None, tuple(images.shape), relu=True)(images, total)
        assert found[0, :, 3:6, 3:6].isnan().all()
    colours, stem = torch.randn(1, 3, 16, 16), Stem(torch.randn(64, 3, 7, 7), None, relu=True)
    colours[0, 1, 8, 8] = float("nan")
    assert stem(colours)[0, :, 3:6, 3:6].isnan().all()


def test_which_convolutions_suit() -> None:
    weight, size = torch.empty(64, 64, 3, 3), (1, 64, 14, 14)
    assert suits(weight, Places(padding=(1, 1)), size)
    assert not suits(weight, Places(), size)
    assert not suits(weight, Places(stride=(2, 2), padding=(1, 1)), size)
    assert not suits(weight, Places(padding=(2, 2), dilation=(2, 2)), size)
    assert not suits(torch.empty(64, 1, 3, 3), Places(padding=(1, 1), groups=64), size)
    assert not suits(torch.empty(64, 64, 1, 1), Places(), size)
    assert not suits(torch.empty(64, 3, 3, 3), Places(padding=(1, 1)), (1, 3, 14, 14))
    assert not suits(weight, Places(padding=(1, 1)), (1, 64, 2, 2))


def test_the_share_that_tiles_can_take() -> None:
    shares = [
        tiled_share(join([load_backbone(f"timm:{name}", weights="none")])[0][0]) for name in ("resnet18", "test_vit")
    ]
    assert shares[0] == pytest.approx(0.83, abs=0.02)  # 13 of 20 convolutions, 1.50 of 1.81 G
    assert shares[1] == 0


def wide(groups: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(32, 32, size, padding=size // 2, groups=groups)


def pooled(images: Tensor) -> Tensor:
    return images.mean((2, 3))


class Parts(nn.Module):
    """Up to three convolutions after one that makes 32 channels."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(3, 32, 3, 2, 1), wide(1, size), wide(1, size), wide(1, size)


class OnItself(Parts):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return pooled((x + self.a(x)).relu())


class UsedLater(Parts):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.b(self.a(x)) + x
        return (self.c(y) + x).mean((2, 3))


class InPlace(Parts):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu_()
        y = self.a(x)
        y += x
        kept = y.view(y.shape)
        y.relu_()
        return self.b(y).mean((2, 3)) + kept.mean((2, 3))


class Shared(Parts):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.a(x)
        return (y.relu() + y).mean((2, 3)) + self.a(y).mean((2, 3))


class Activations(Parts):
    def forward(self, images: Tensor) -> Tensor:
        f = nn.functional
        x = f.hardswish(self.stem(images))
        x = f.silu(self.a(x)) + f.relu6(self.b(x)) + f.leaky_relu(self.c(x), 0.1)
        return torch.sigmoid(self.a(x)).mean((2, 3))


class Pooled(Parts):
    """Max pooling that is ours, of another kernel, of too few channels, and with the places that were the largest."""

    def forward(self, images: Tensor) -> Tensor:
        f = nn.functional
        x = self.stem(images)
        y = f.max_pool2d(x, 3, 2, 1)
        y = self.a(y) + y + f.max_pool2d(x, 2, 2, ceil_mode=True)
        few, (kept, places) = f.max_pool2d(images, 3, 2, 1), f.max_pool2d(x, 3, 2, 1, return_indices=True)
        return pooled(y) + pooled(few).mean(1, keepdim=True) + pooled(kept + places / 1000)


class Broadcast(Parts):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return (self.a(x) + x.mean((2, 3), keepdim=True) + 1).mean((2, 3))


class Odd(Parts):
    def __init__(self, size: int = 3) -> None:
        super().__init__(size)
        self.up, self.line = nn.ConvTranspose2d(32, 32, 2, 2), nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.up(self.stem(images))
        weight = self.a.weight - self.a.weight.mean()  # computed, so not ours to pack
        x = nn.functional.conv2d(x, weight, padding=1)
        found: Tensor = self.line(x.mean(2))
        return found.mean(2)


class Branches(Parts):
    """The shortcut is a convolution that comes after the one that is added to it."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.a(x)
        return pooled((y + self.b(x)).relu())


class Shortcut(Parts):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        return pooled((self.b(self.a(x).relu()) + x).relu())


class Stems(nn.Module):
    """Stems before pooling, one wanted before it too; before another activation; and added to."""

    def __init__(self, _size: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 64, 7, 2, 3) for _ in range(4))

    def forward(self, images: Tensor) -> Tensor:
        f = nn.functional
        images = f.pad(images, (1, 1, 1, 1))  # 32 pixels
        x, y = self.a(images).relu(), self.b(images)
        small = f.max_pool2d(x, 3, 2, 1) + f.max_pool2d(y, 3, 2, 1)
        return pooled(small) + pooled(y) + pooled(f.silu(self.c(images)) + self.d(images))


def backbone_of(model: nn.Module, size: int = 30) -> Backbone:
    return load_backbone(model.eval(), transform=Transform((size, size), size))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "model", [OnItself, UsedLater, InPlace, Shared, Activations, Pooled, Broadcast, Odd, Branches, Shortcut, Stems]
)
def test_the_graph_computes_what_the_module_does(model: Callable[[int], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    joints, _ = join([backbone_of(model(size))])
    pixels = np.random.default_rng(0).integers(0, 256, tuple(joints[0].example(SIZE).shape), dtype=np.uint8)
    with torch.inference_mode():
        (expected,) = joints[0](torch.from_numpy(pixels))
    session = Fused(joints, batch_size=SIZE)
    for _ in range(2):  # nothing of the first pass is left in the second
        (found,) = session(0, pixels)
        assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_a_table_gives_the_colours_of_normalisation(channels: str) -> None:
    transform = Transform((20, 30), 20, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), channels=channels)
    (joint,), _ = join([load_backbone(Shortcut().eval(), transform=transform)])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    colours = _Colours.of(joint)
    assert colours is not None
    assert torch.equal(colours(pixels), transform.normalise(pixels))


class Own:
    """A transform of the user's, which gives images that are normalised."""

    def to_dict(self) -> dict[str, int]:
        return {"size": 24}

    def __call__(self, image: object) -> Tensor:
        return torch.full((3, 24, 24), 0.5)


def test_images_may_come_normalised() -> None:
    torch.manual_seed(0)
    backbone = load_backbone(Shortcut().eval(), transform=Own())
    joints, _ = join([backbone])
    images = torch.randn(tuple(joints[0].example(SIZE).shape))
    with torch.inference_mode():
        (expected,) = joints[0](images)
    (found,) = Fused(joints, batch_size=SIZE)(0, images.numpy())
    assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()


def test_another_batch_size_is_refused() -> None:
    joints, _ = join([backbone_of(Shortcut())])
    with pytest.raises(ValueError, match="a batch of shape"):
        Fused(joints, batch_size=SIZE)(0, np.zeros((SIZE - 1, 30, 30, 3), np.uint8))


def test_without_numba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # as import finds it where it is not installed
    assert not has_fused()
    with pytest.raises(UsageError, match="fused is not installed") as error:
        Fused([], batch_size=SIZE)
    assert "embedpipe[fused]" in str(error.value.hint)


def calls(model: nn.Module) -> tuple[list[str], int]:
    """Return the kinds of calls that a model's graph comes to, and how many additions copy first."""
    (joint,), _ = join([backbone_of(model)])
    whole = fuse(joint, SIZE)
    ours = [type(whole.get_submodule(str(n.target))).__name__ for n in whole.graph.nodes if n.op == "call_module"]
    return ours, sum(node.target == "clone" for node in whole.graph.nodes)


def test_memory_is_used_again_only_where_nobody_wants_it() -> None:
    assert calls(Branches()) == (["Convolution", "Winograd", "Winograd"], 0)
    assert calls(Shortcut()) == (["Convolution", "Winograd", "Winograd"], 0)
    assert calls(OnItself()) == (["Convolution", "Winograd"], 1)
    assert calls(UsedLater()) == (["Convolution", "Winograd", "Winograd", "Winograd"], 1)


@pytest.mark.parametrize("wide", [True, False])
def test_a_stem_pools_where_nobody_wants_what_lies_between(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedpipe.inference._stem._has_wide_registers", lambda: wide)
    kinds, _ = calls(Stems())
    expected = (
        ["Stem", "Stem", "Pooling", "Stem", "Convolution"]
        if wide
        else ["Convolution", "Pooling"] * 2 + ["Convolution"] * 2
    )
    assert sorted(kinds) == sorted(expected)


def test_nothing_is_left_of_what_was_fused() -> None:
    (joint,), _ = join([load_backbone("timm:resnet18", weights="none")])
    whole = fuse(joint, 2)
    left = [str(node.target) for node in whole.graph.nodes if node.op == "call_function"]
    assert not [name for name in left if any(word in name for word in ("convolution", "relu", "add", "batch_norm"))]
    held = sum(one.numel() for one in [*whole.parameters(), *whole.buffers()])
    assert held < 1000  # the weights are not kept a second time

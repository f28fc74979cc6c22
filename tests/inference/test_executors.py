"""Executors agree with the plain module, row by row and bit by bit where that is promised. Random weights: mechanics."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from embedpipe.backbones import Backbone, SharedModel, at_layer, join, load_backbone
from embedpipe.images import Transform
from embedpipe.inference import InferenceSettings
from embedpipe.inference._folding import find_pairs, fold
from embedpipe.inference._openvino import OpenVino, graph_name
from embedpipe.inference._runner import Executor
from embedpipe.inference._torch import Torch

BATCH = 4
NAMES = ("timm:test_resnet", "timm:test_efficientnet", "timm:test_vit", "torchvision:mobilenet_v3_small")
MAKERS: dict[str, Callable[[list[SharedModel]], Executor]] = {
    "eager": lambda shared_models: Torch(shared_models, InferenceSettings()),
    "eager, not folded": lambda shared_models: Torch(shared_models, InferenceSettings(), folded=False),
    "openvino": lambda shared_models: OpenVino(shared_models, InferenceSettings(batch_size=BATCH, streams=2)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As `forwarding` sets it: with more, a row's bits depend on how a batch is shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name: str, layer: str | None = None) -> Backbone:
    """Return a backbone whose batch normalisations do something."""
    backbone = load_backbone(name, weights="none", layer=layer)
    generator = torch.Generator().manual_seed(1)
    for module in backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return backbone


def pixels_for(shared_model: SharedModel, count: int = BATCH) -> np.ndarray:
    shape = tuple(shared_model.example(count).shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def plain(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    assert isinstance(backbone.transform, Transform)
    with torch.inference_mode():
        features: torch.Tensor = backbone.module(backbone.transform.normalise(pixels))
    return features.numpy()


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_plain_module(name: str, maker: str) -> None:
    backbone = load(name)
    shared_models, _ = join([backbone])
    pixels = pixels_for(shared_models[0])
    expected = plain(backbone, pixels)
    (found,) = MAKERS[maker](shared_models)(0, pixels)
    assert found.dtype == np.float32
    assert largest(found, expected) < 1e-5


@pytest.mark.parametrize("maker", ["eager", "openvino"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_place_or_its_thread(name: str, maker: str) -> None:
    shared_models, _ = join([load(name)])
    session, pixels = MAKERS[maker](shared_models), pixels_for(shared_models[0])
    (first,) = session(0, pixels)
    order = np.array([2, 0, 3, 1])
    with ThreadPoolExecutor(2) as threads:
        shuffled = list(threads.map(lambda _: session(0, np.ascontiguousarray(pixels[order]))[0], range(4)))
    for found in shuffled:
        np.testing.assert_array_equal(found, first[order])


@pytest.mark.parametrize("maker", MAKERS)
def test_several_layers_come_from_one_pass(maker: str) -> None:
    last = load("timm:test_resnet")
    backbones = [last, at_layer(last, "layer2"), at_layer(last, "layer4", pool="max")]
    shared_models, of = join(backbones)
    assert (len(shared_models), of) == (1, [0, 0, 0])
    pixels, passes = pixels_for(shared_models[0]), []
    expected = [plain(backbone, pixels) for backbone in backbones]
    last.module.model.register_forward_hook(lambda *_: passes.append(1))
    found = MAKERS[maker](shared_models)(0, pixels)
    for backbone, one in zip(backbones, expected, strict=True):
        assert largest(found[shared_models[0].output_of(backbone)], one) < 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.slow  # compiling takes ten seconds and more
@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_a_compiled_module_serves_threads_that_start_together(name: str) -> None:
    last = load(name)
    backbones = [last, at_layer(last, last.layers[1].name)]
    shared_models, _ = join(backbones)
    session, pixels = Torch(shared_models, InferenceSettings(executor="compile")), pixels_for(shared_models[0])
    barrier = threading.Barrier(3)

    def run(_: int) -> list[np.ndarray]:
        barrier.wait()
        return [session(0, pixels) for _ in range(3)][-1]

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(run, range(3)))
    for features in found:
        for backbone, one in zip(backbones, features, strict=True):
            assert largest(one, plain(backbone, pixels)) < 1e-5


def test_a_pass_ends_at_the_last_layer_wanted() -> None:
    first = load("timm:test_resnet", "layer1")
    (shared_model,), _ = join([first, at_layer(first, "layer2")])
    reached = []
    first.module.model.layer3.register_forward_hook(lambda *_: reached.append(1))  # type: ignore[union-attr]
    Torch([shared_model], InferenceSettings(), folded=False)(0, pixels_for(shared_model))
    assert not reached


def test_backbones_with_another_normalisation_do_not_share_a_pass() -> None:
    from dataclasses import replace

    one = load("timm:test_resnet")
    assert isinstance(one.transform, Transform)
    other = replace(one, transform=replace(one.transform, mean=(0.1, 0.2, 0.3)))
    shared_models, of = join([one, other])
    assert of == [0, 1]
    pixels = pixels_for(shared_models[0])
    session = Torch(shared_models, InferenceSettings())
    for n, backbone in enumerate((one, other)):
        assert largest(session(n, pixels)[0], plain(backbone, pixels)) < 1e-5


def test_folding_takes_every_norm_that_follows_a_convolution() -> None:
    (shared_model,), _ = join([load("timm:test_resnet")])
    norms = [m for m in shared_model.extractor.model.modules() if isinstance(m, nn.BatchNorm2d)]
    folded = fold(shared_model)
    assert len(find_pairs(shared_model)) == len(norms) > 5
    assert not [m for m in folded.extractor.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [
        m for m in shared_model.extractor.model.modules() if isinstance(m, nn.BatchNorm2d)
    ] == norms  # the model is left alone


class Branching(nn.Module):
    """The convolution's output goes on beside its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.conv(images)
        return torch.cat([first, self.norm(first)], 1).mean((2, 3))


def test_a_convolution_whose_output_is_used_twice_is_left_alone() -> None:
    backbone = load_backbone(Branching(), transform=Transform((16, 16), 16))
    (shared_model,), _ = join([backbone])
    pixels = pixels_for(shared_model)
    assert largest(Torch([shared_model], InferenceSettings())(0, pixels)[0], plain(backbone, pixels)) < 1e-6
    assert fold(shared_model) is shared_model


def test_a_convolution_that_is_the_layer_is_left_alone() -> None:
    backbone = load("timm:test_resnet", "conv1.0")
    (shared_model,), _ = join([backbone])
    pixels = pixels_for(shared_model)
    assert largest(Torch([shared_model], InferenceSettings())(0, pixels)[0], plain(backbone, pixels)) < 1e-6


def test_a_kept_graph_is_taken_again_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    shared_models, _ = join([load("timm:test_resnet")])
    pixels = pixels_for(shared_models[0])

    def run() -> np.ndarray:
        return OpenVino(shared_models, InferenceSettings(batch_size=BATCH, graphs=tmp_path))(0, pixels)[0]

    first = run()
    (kept,) = tmp_path.iterdir()
    assert kept.name == graph_name(shared_models)
    before = (kept / "graph.xml").stat().st_ino
    np.testing.assert_array_equal(run(), first)
    assert (kept / "graph.xml").stat().st_ino == before
    (kept / "graph.xml").write_bytes((kept / "graph.xml").read_bytes()[:100])
    np.testing.assert_array_equal(run(), first)
    assert len((kept / "graph.xml").read_bytes()) > 100


def test_other_weights_are_another_graph() -> None:
    one, _ = join([load_backbone("timm:test_resnet", weights="none")])
    other, _ = join([load_backbone("timm:test_resnet", weights="none", seed=1)])
    layer, _ = join([load_backbone("timm:test_resnet", weights="none", layer="layer3")])
    assert len({graph_name(shared_models) for shared_models in (one, other, layer)}) == 3

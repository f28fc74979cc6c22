"""Features are what enters the classifier of the untouched library model: one of each family of torchvision and timm.

The reference knows nothing of the package: the library's model, the same weights, plain hooks. The slow tier takes all names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from embedpipe.backbones import load_backbone
from embedpipe.backbones._backbone import remove_classifiers
from embedpipe.backbones._extractor import FeatureExtractor, choose_hooks
from embedpipe.backbones._loading import LIBRARIES
from embedpipe.backbones._trace import MetaWeights

HERE = Path(__file__).parent
TORCHVISION = [f"torchvision:{name}" for name in models.list_models(module=models)]
# The smallest of each module of torchvision, and of resnets and regnets one of each kind.
ONE_OF_EACH = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11"),
    *("vgg11_bn", "vit_b_32"),
)
SMALLEST = dict(line.split() for line in (HERE / "smallest.txt").read_text().splitlines() if line and line[0] != "#")
CANNOT_WORK = dict(
    line.split(": ", 1) for line in (HERE / "cannot_work.txt").read_text().splitlines() if line and line[0] != "#"
)
BIG = 100e6
LENGTHY = ("sequencer2d_s", "pnasnet5large", "nasnetalarge", "gemma4_vit_167m")
SLOW = pytest.mark.slow
TINY_PX = 64
LEAST_PX = dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), 96)
AS_PUBLISHED = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": False},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": False},
    "vit_h_14": {"image_size": 518},
}


class QuickRandom(TorchFunctionMode):
    """Fill from one block of random numbers, again and again: the numbers need not be good, only
    there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normal = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
        self.uniform = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, named = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "erfinv_":  # uniform numbers will do
            return args[0]
        tensor = args[0] if args else named.get("tensor")
        if name not in self.RANDOM or tensor.numel() < 1000 or tensor.is_meta:
            return func(*args, **named)
        if name == "normal_":
            mean, std = (*args[1:], *(0.0, 1.0)[max(len(args) - 1, 0) :])
            return self.fill(tensor, self.normal, named.get("std", std), named.get("mean", mean))
        if name == "uniform_":
            low, high = (*args[1:], *(0.0, 1.0)[max(len(args) - 1, 0) :])
            low, high = named.get("a", low), named.get("b", high)
            return self.fill(tensor, self.uniform, high - low, low)
        return self.fill(tensor, self.normal, (tensor.numel() / len(tensor)) ** -0.5, 0.0)

    RANDOM = ("normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")

    @staticmethod
    def fill(tensor: Tensor, block: Tensor, scale: float, shift: float) -> Tensor:
        with torch.no_grad():
            flat, numbers = tensor.view(-1), block * scale + shift
            for start in range(0, len(flat), len(numbers)):
                flat[start : start + len(numbers)] = numbers[: len(flat) - start]
        return tensor


def library_model(name: str, *, img_size: int | None = None) -> nn.Module:
    source, _, architecture = name.partition(":")
    if source == "timm":
        return timm.create_model(architecture, **({"img_size": img_size} if img_size else {}))
    return models.get_model(architecture, weights=None, **AS_PUBLISHED.get(architecture, {}))


def classifiers(name: str, model: nn.Module) -> list[str]:
    source, _, architecture = name.partition(":")
    if source == "timm":
        named = timm.get_pretrained_cfg(architecture).classifier or ()
        named = [named] if isinstance(named, str) else list(named)
        return [n for n in named if not isinstance(dict(model.named_modules()).get(n), nn.Identity | None)]
    found = [
        n for n, m in model.named_modules() if 1000 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
    ]
    return found[-1:]


@contextmanager
def caught(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: inputs.__setitem__(n, args[0]))
        for n in names
    ]
    yield inputs
    for handle in handles:
        handle.remove()


def reference(name: str, model: nn.Module, images: Tensor) -> Tensor:
    names = classifiers(name, model)
    with torch.no_grad(), caught(model, names) as inputs:
        output = model(images)
    entered = [inputs[n] for n in names] or [output]
    pooled = [x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x for x in entered]
    return torch.cat(pooled, 1)


def size_for(name: str) -> int | None:
    source, _, architecture = name.partition(":")
    least = LEAST_PX.get(architecture, TINY_PX)
    if source == "timm":
        cfg = timm.get_pretrained_cfg(architecture)
        return None if cfg.fixed_input_size else max(least, (cfg.min_input_size or (3, 0))[1])
    return None if architecture.startswith(("vit", "maxvit")) else least


def check_numbers(name: str) -> None:
    with QuickRandom():
        backbone = load_backbone(name, weights="none", image_size=size_for(name))
        untouched = library_model(name, img_size=backbone.spec["build"].get("img_size")).eval()
    state = backbone.module.model.state_dict()
    missing, extra = untouched.load_state_dict(state, strict=False, assign=True)
    assert not extra
    assert all(key.startswith(tuple(classifiers(name, untouched))) for key in missing), missing
    count = 2 if backbone.image_size[0] <= 2 * TINY_PX else 1
    shape = (count, 3, *backbone.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = reference(name, untouched, images)
    with torch.no_grad():
        features = backbone.module(images)
    assert features.shape == (count, backbone.feature_dim)
    assert torch.isfinite(expected).all()
    largest = float(expected.abs().max())
    assert largest > 0
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * largest)


def check_structure(name: str) -> None:
    source, _, architecture = name.partition(":")
    library = LIBRARIES[source]
    with MetaWeights():
        untouched = library_model(name).eval().to("meta")
    size = library.transform_for(architecture, None, None, None).crop_size
    images = torch.empty(2, 3, *size, device="meta")
    expected = reference(name, untouched, images)
    trace, heads = remove_classifiers(untouched, library.classifiers_of(architecture, untouched), size, name)
    hooks = choose_hooks(untouched, trace, heads=heads, layer=None, pool="auto", name=name)
    with torch.no_grad():
        features = FeatureExtractor(untouched, hooks).eval()(images)
    assert features.shape == expected.shape


def parameters(name: str) -> int:
    with MetaWeights():
        return sum(p.numel() for p in library_model(name).parameters())


def check(name: str) -> None:
    (check_numbers if parameters(name) <= BIG else check_structure)(name)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_of_each_torchvision_family(name: str) -> None:
    check_numbers(f"torchvision:{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_name(name: str) -> None:
    check_numbers(name)


@pytest.mark.parametrize("name", [pytest.param(one, marks=SLOW if one in LENGTHY else ()) for one in SMALLEST.values()])
def test_one_of_each_timm_family(name: str) -> None:
    check(f"timm:{name}")


def test_the_list_of_torchvision_families_is_complete() -> None:
    families = {module_of(name.partition(":")[2]) for name in TORCHVISION}
    assert families == {module_of(name) for name in ONE_OF_EACH}


def module_of(name: str) -> str:
    return models.get_model_builder(name).__module__


def test_the_list_of_families_is_complete() -> None:
    families = {model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    assert families == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models())
def test_every_timm_name_works_or_is_listed(name: str) -> None:
    if name not in CANNOT_WORK:
        return check(f"timm:{name}")
    with pytest.raises(Exception, match=re.escape(CANNOT_WORK[name])):
        check(f"timm:{name}")


def test_what_cannot_work_exists() -> None:
    assert set(CANNOT_WORK) <= set(timm.list_models())

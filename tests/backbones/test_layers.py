"""Intermediate layers: maps, NHWC maps and tokens become one vector, and no class or register token
enters an average.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from embedpipe.backbones import load_backbone
from embedpipe.backbones._extractor import count_prefix, layout_of
from embedpipe.errors import UsageError


def outputs_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, args, output: kept.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[-1]


def both(name: str, layer: str, pool: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the features of a layer, and what a hook sees there in the same model."""
    backbone = load_backbone(name, weights="none", layer=layer, pool=pool)
    images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone.module(images)
    assert features.shape == (2, backbone.feature_dim)
    plain = load_backbone(name, weights="none")
    return features, outputs_of(plain.module.model, layer, images)


@pytest.mark.parametrize(
    ("pool", "reduce"),
    [("auto", lambda x: x.mean((2, 3))), ("max", lambda x: x.amax((2, 3))), ("none", lambda x: x.flatten(1))],
)
def test_map(pool: str, reduce) -> None:
    features, output = both("test_resnet", "layer2", pool)
    torch.testing.assert_close(features, reduce(output))


def test_nhwc_map_is_recognised() -> None:
    features, output = both("timm:swin_tiny_patch4_window7_224", "layers.1")
    assert output.shape == (2, 28, 28, 192)
    torch.testing.assert_close(features, output.mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "layer", "prefix"),
    [
        ("timm:test_vit", "blocks.2", 1),
        ("timm:test_vit2", "blocks.2", None),
        ("timm:test_vit3", "blocks.2", None),
        ("timm:deit_tiny_distilled_patch16_224", "blocks.0", 2),
        ("timm:vit_tiny_patch16_224", "patch_embed", 0),
        ("torchvision:vit_b_32", "encoder.dropout", 1),
        ("torchvision:vit_b_32", "encoder.layers.encoder_layer_0", 1),
        ("timm:coat_tiny", "serial_blocks1.0", 1),
    ],
)
def test_only_patches_enter_the_average(name: str, layer: str, prefix: int | None) -> None:
    features, output = both(name, layer)
    if prefix is None:
        prefix = load_backbone(name, weights="none").module.model.num_prefix_tokens
    tokens = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
    side = round((tokens.shape[1] - prefix) ** 0.5)
    assert side * side == tokens.shape[1] - prefix
    torch.testing.assert_close(features, tokens[:, prefix:].mean(1))


def test_register_tokens_stay_out() -> None:
    name = "timm:vit_small_patch14_reg4_dinov2"
    backbone = load_backbone(name, weights="none", layer="blocks.0", image_size=56)
    images = torch.randn(1, 3, 56, 56)
    output = outputs_of(load_backbone(name, weights="none", image_size=56).module.model, "blocks.0", images)
    assert output.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(backbone.module(images), output[:, 5:].mean(1))


def test_class_token() -> None:
    features, output = both("test_vit", "blocks.2", "cls")
    assert torch.equal(features, output[:, 0])


def test_a_module_that_runs_twice_gives_its_last_output() -> None:
    features, output = both("torchvision:resnet18", "layer1.0.relu")
    torch.testing.assert_close(features, output.mean((2, 3)))


def test_the_pass_ends_at_the_layer() -> None:
    module = load_backbone("test_resnet", weights="none", layer="layer2").module
    module.model.layer3.register_forward_pre_hook(lambda *_: pytest.fail("layer3 was run"))
    module(torch.zeros(1, 3, 160, 160))


def test_said_no() -> None:
    with pytest.raises(UsageError, match="no layer 'layer9' in timm:test_resnet") as caught:
        load_backbone("test_resnet", weights="none", layer="layer9")
    assert "did you mean 'layer" in caught.value.hint
    with pytest.raises(UsageError, match="no class token"):
        load_backbone("test_resnet", weights="none", layer="layer2", pool="cls")
    with pytest.raises(UsageError, match="no class token"):
        load_backbone("test_resnet", weights="none", pool="cls")
    with pytest.raises(UsageError, match="no pool 'mean'"):
        load_backbone("test_resnet", weights="none", pool="mean")
    with pytest.raises(UsageError, match="returns no tensor"):
        load_backbone(
            "torchvision:vit_b_32", weights="none", layer="encoder.layers.encoder_layer_0.self_attention.out_proj"
        )


def test_layouts() -> None:
    assert layout_of((2, 64, 7, 7), (224, 224)) == "map"
    assert layout_of((2, 7, 7, 64), (224, 224)) == "nhwc"
    assert layout_of((2, 7, 7, 7), (224, 224)) == "map"
    assert layout_of((2, 7, 7, 7), (224, 224), channels_last=True) == "nhwc"
    assert layout_of((2, 64, 16, 12), (1024, 768)) == "map"
    assert layout_of((2, 16, 12, 64), (1024, 768)) == "nhwc"
    assert layout_of((2, 64, 1, 1), (224, 224)) == "map"
    assert [count_prefix(n, (224, 224), 1) for n in (197, 196, 1)] == [1, 0, 0]
    assert count_prefix(64 * 48 + 5, (1024, 768), 5) == 5

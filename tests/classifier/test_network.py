"""Who learns how fast, and who decays."""

from __future__ import annotations

import numpy as np
import pytest

from embedpipe.backbones import load_backbone
from embedpipe.classifier.network import Network, parameter_groups, release
from embedpipe.heads import LinearHead

RATES = {"lr": 1.0, "head_lr": 7.0, "layer_decay": 0.5, "weight_decay": 0.1, "l2_sp": 0.0}


def groups_of(name: str, unfreeze: str, **rates: float) -> dict[str, tuple[float, float, bool]]:
    """Return the rate, the decay and whether it is anchored, of every trainable parameter."""
    backbone = load_backbone(name, weights="none")
    head = LinearHead(np.zeros((2, backbone.feature_dim), np.float32), np.zeros(2, np.float32), ("a", "b"))
    network = Network(backbone.module, head)
    release(network, backbone, [unfreeze], bn="affine")
    names = {id(p): n.removeprefix("backbone.model.") for n, p in network.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"], group["anchored"])
        for group in parameter_groups(network, backbone, **{**RATES, **rates})
        for p in group["params"]
    }


def test_rates_fall_towards_the_input_by_the_models_own_layers() -> None:
    found = groups_of("timm:test_vit", "all")
    last = max(int(name.split(".")[1]) for name in found if name.startswith("blocks."))
    assert found["head.weight"] == (7.0, 0.1, False)
    assert found["head.bias"] == (7.0, 0.0, False)
    assert found[f"blocks.{last}.attn.qkv.weight"] == (1.0, 0.1, False)
    assert found["blocks.0.attn.qkv.weight"] == (0.5**last, 0.1, False)
    assert found["patch_embed.proj.weight"] == (0.5 ** (last + 1), 0.1, False)
    assert found["pos_embed"] == (0.5 ** (last + 1), 0.0, False)
    assert found["norm.weight"] == (1.0, 0.0, False)


def test_rates_of_torchvision_fall_by_stages() -> None:
    found = groups_of("torchvision:squeezenet1_1", "2")
    rates = {rate for name, (rate, *_) in found.items() if not name.startswith("head.")}
    assert rates == {1.0, 0.5}


@pytest.mark.parametrize("l2_sp", [0.0, 0.3])
def test_what_is_anchored_does_not_decay(l2_sp: float) -> None:
    found = groups_of("timm:test_resnet", "layer4", l2_sp=l2_sp)
    assert found["layer4.0.conv1.weight"][1:] == ((0.0, True) if l2_sp else (0.1, False))
    assert found["layer4.0.bn1.weight"][1:] == (0.0, False)
    assert found["head.weight"][1:] == (0.1, False)

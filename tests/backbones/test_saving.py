"""What `save_model` writes, the library loads to the same logits and `load_model` to the same
features.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torchvision import models

from embedpipe.backbones import describe_layers, load_backbone, load_model, save_model
from embedpipe.errors import ModelMismatch, StorageError, UsageError
from embedpipe.images import Transform

CLASSES = ["cat", "class_10", "class_2"]


def saved(name: str, folder, **kwargs):
    backbone = load_backbone(name, weights="none", **kwargs)
    random = np.random.default_rng(0)
    weight = random.normal(size=(3, backbone.feature_dim)).astype(np.float32)
    bias = random.normal(size=3).astype(np.float32)
    whole = save_model(backbone, weight, bias, CLASSES, folder)
    images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = backbone.module(images) @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    return backbone, whole, images, logits


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("timm:test_resnet", {}),
        ("timm:test_resnet.r160_in1k", {"image_size": 96, "crop_pct": 96 / 118.5}),
        ("timm:test_vit", {"image_size": 96}),
        ("timm:tf_efficientnet_lite0", {}),
        ("timm:convnext_atto", {}),
        ("timm:vit_small_patch14_dinov2", {"image_size": 56}),
        ("timm:caformer_s18", {}),
        ("timm:resnetv2_50x1_bit", {"image_size": 64}),
    ],
)
def test_timm_loads_the_folder(name: str, kwargs, tmp_path) -> None:
    backbone, whole, images, logits = saved(name, tmp_path, **kwargs)
    assert whole
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
    assert list(model.pretrained_cfg["label_names"]) == CLASSES
    theirs = create_transform(**resolve_model_data_config(model))
    image = timm.data.transforms.transforms.ToPILImage()(torch.rand(3, 77, 91))
    assert torch.equal(theirs(image), backbone.transform(image))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_32", "googlenet"])
def test_torchvision_loads_the_folder(name: str, tmp_path) -> None:
    _, whole, images, logits = saved(f"torchvision:{name}", tmp_path)
    assert whole
    config = json.loads((tmp_path / "config.json").read_text())
    model = models.get_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
    assert config["label_names"] == CLASSES


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("timm:test_resnet", {"image_size": 96, "crop_pct": 0.9}),
        ("timm:test_vit", {"layer": "blocks.1", "pool": "cls"}),
        ("timm:test_resnet", {"layer": "layer2"}),
        ("timm:vit_small_patch14_dinov2", {"image_size": 56}),
        ("torchvision:squeezenet1_1", {}),
        ("timm:deit_tiny_distilled_patch16_224", {}),
        ("torchvision:inception_v3", {}),
    ],
)
def test_load_model_gives_the_same_backbone(name: str, kwargs, tmp_path) -> None:
    backbone, _, images, _ = saved(name, tmp_path, **kwargs)
    again = load_backbone(str(tmp_path))
    assert again.spec == backbone.spec
    assert (again.name, again.origin, again.feature_dim) == (backbone.name, backbone.origin, backbone.feature_dim)
    assert again.transform == backbone.transform
    with torch.no_grad():
        assert torch.equal(again.module(images), backbone.module(images))


def test_squeezenet_and_several_heads_keep_the_classifier_apart(tmp_path) -> None:
    for name in ("torchvision:squeezenet1_1", "timm:deit_tiny_distilled_patch16_224"):
        _, whole, _, _ = saved(name, tmp_path)
        assert not whole
        assert json.loads((tmp_path / "embedpipe.json").read_text())["classifier"] == []


def test_another_layer_of_a_stored_model(tmp_path) -> None:
    saved("timm:test_resnet", tmp_path)
    stored = load_model(tmp_path, layer="layer2")
    plain = load_backbone("test_resnet", weights="none", layer="layer2")
    assert stored.spec == plain.spec


@pytest.mark.parametrize(
    "option", [{"weights": "packaged"}, {"image_size": 96}, {"crop_pct": 0.9}, {"interpolation": "bilinear"}]
)
def test_a_stored_model_keeps_its_own_weights_and_transform(option, tmp_path) -> None:
    saved("timm:test_resnet", tmp_path)
    flag = next(iter(option)).replace("_", "-")
    with pytest.raises(UsageError, match=f"brings its own weights and transform: it cannot take --{flag}"):
        load_backbone(tmp_path, **option)


def test_another_transform_of_a_stored_model(tmp_path) -> None:
    saved("timm:test_resnet", tmp_path)
    other = Transform(crop_size=(32, 32), resize_size=32)
    assert load_backbone(tmp_path, transform=other).spec["transform"] == other.to_dict()


def test_layers_of_a_stored_model(tmp_path) -> None:
    saved("timm:test_resnet", tmp_path)
    assert describe_layers(str(tmp_path)) == describe_layers("timm:test_resnet")


def test_saved_bytes_are_the_same_each_time(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        saved("timm:test_resnet", tmp_path / folder)
    for name in ("model.safetensors", "config.json", "embedpipe.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_said_no(tmp_path) -> None:
    with pytest.raises(ModelMismatch, match="no model of embedpipe"):
        load_model(tmp_path)
    saved("timm:test_resnet", tmp_path)
    description = json.loads((tmp_path / "embedpipe.json").read_text())
    (tmp_path / "embedpipe.json").write_text(json.dumps(description | {"schema": 2}))
    with pytest.raises(ModelMismatch, match="has the format 2"):
        load_model(tmp_path)
    (tmp_path / "embedpipe.json").write_text(json.dumps(description | {"name": "timm:test_vit"}))
    with pytest.raises(ModelMismatch, match="is not for timm:test_vit"):
        load_model(tmp_path)
    with pytest.raises(StorageError):
        saved("timm:test_resnet", tmp_path / "missing")


def test_own_module(tmp_path) -> None:
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1))
    backbone = load_backbone(own, transform=Transform(crop_size=(8, 8), resize_size=8))
    assert not save_model(backbone, np.zeros((2, 4), np.float32), np.zeros(2, np.float32), ["a", "b"], tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == set(own.state_dict())
    with pytest.raises(ModelMismatch, match="module of your own"):
        load_model(tmp_path)

"""Backbones: any classification model of timm and torchvision, or a user's own, as a frozen
function from images to features.

Upper floors enter here, and only inside functions: the room imports torch. timm lives behind `_timm`, torchvision's
models behind `_torchvision`; the rest of the room does not know which of them it handles.

>>> backbone = load_backbone("timm:resnet18", weights="none")
>>> backbone.module(backbone.transform(image)[None]).shape
torch.Size([1, 512])
"""

from embedpipe.backbones._assembling import at_layer
from embedpipe.backbones._backbone import Backbone, Layer, refresh
from embedpipe.backbones._cut import Cut, cut_before, trunk_of
from embedpipe.backbones._headless import Headless
from embedpipe.backbones._joint import Joint, join
from embedpipe.backbones._libraries import list_models
from embedpipe.backbones._loading import describe_layers, load_backbone
from embedpipe.backbones._saving import load_model, open_whole, save_model
from embedpipe.backbones._unfreezing import frozen_modules, unfreeze_parameters

__all__ = [
    "Backbone",
    "Cut",
    "Headless",
    "Joint",
    "Layer",
    "at_layer",
    "cut_before",
    "trunk_of",
    "describe_layers",
    "frozen_modules",
    "join",
    "list_models",
    "load_backbone",
    "load_model",
    "open_whole",
    "refresh",
    "save_model",
    "unfreeze_parameters",
]

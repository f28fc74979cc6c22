"""Backbones: any classification model of timm and torchvision, or a user's own, as a frozen
function from images to features.

Importing this package imports torch, so other packages import it inside functions. Only `_timm` uses timm, and only
`_torchvision` uses torchvision's models.

>>> backbone = load_backbone("timm:resnet18", weights="none")
>>> backbone.module(backbone.transform(image)[None]).shape
torch.Size([1, 512])
"""

from embedpipe.backbones._backbone import (
    Backbone,
    Layer,
    SharedModel,
    at_layer,
    cut_before,
    join,
    refresh,
    trunk_backbone,
)
from embedpipe.backbones._extractor import FeatureExtractor
from embedpipe.backbones._loading import describe_layers, list_models, load_backbone, load_model
from embedpipe.backbones._saving import open_saved_model, save_model
from embedpipe.backbones._unfreezing import frozen_modules, unfreeze_parameters

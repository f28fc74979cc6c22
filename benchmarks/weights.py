"""Seeded random weights that behave like trained ones, written once and loaded by every way that is compared.

Batch norms get random gains (a residual network starts with gains of 0, which would hide its branches from the parity
check) and the statistics of some photos, so that activations keep the scale that they have in a trained network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from measuring import HERE
from photos import list_images, make_photos
from PIL import Image
from torch import nn

FOLDER = HERE / ".weights"
SEED = 7
CALIBRATION = 32  # photos


def write_weights(name: str) -> Path:
    """Return the file with the weights of a timm model (torchvision's model of the same name takes them too)."""
    import timm

    file = FOLDER / f"{name}-{SEED}.pth"
    if not file.exists():
        torch.manual_seed(SEED)
        model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                module.momentum = None  # the plain average of all batches
        transform = recipe(name)
        images = [transform(Image.open(path).convert("RGB")) for path in list_images(make_photos(CALIBRATION))]
        with torch.no_grad():
            model.train()(torch.stack(images))
        FOLDER.mkdir(exist_ok=True)
        torch.save(model.state_dict(), file)
    return file


def read_model(name: str, *, headless: bool = True) -> Any:
    """Return timm's model with these weights, in eval mode."""
    import timm

    model = timm.create_model(name)
    model.load_state_dict(torch.load(write_weights(name), weights_only=True))
    if headless:
        model.reset_classifier(0)
    return model.eval()


def recipe(name: str) -> Any:
    """Return the plain recipe for the pixels of a model: torchvision's transforms of a PIL image, exact."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg
    from torchvision import transforms

    data = resolve_data_config({}, pretrained_cfg=get_pretrained_cfg(name).to_dict())
    size = data["input_size"][1]
    steps = [
        transforms.Resize(int(size / data["crop_pct"]), transforms.InterpolationMode(data["interpolation"])),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(data["mean"], data["std"]),
    ]
    return transforms.Compose(steps)

"""torchvision's classification models. `_timm` has the same functions.

>>> build("resnet18", options={}, pretrained=False)
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path, PurePath
from typing import Any

from safetensors.torch import load_file
from torch import hub, nn
from torchvision import models

from embedpipe.images import Transform

AUXILIARY = ("aux1", "aux2", "AuxLogits")  # training-time classifiers: in published weights, but not built here
INCEPTION = {"aux_logits": False, "transform_input": True, "init_weights": True}
OPTIONS = {"googlenet": INCEPTION, "inception_v3": INCEPTION}


def names() -> list[str]:
    """Return the classification models."""
    return list(models.list_models(module=models))


def knows(architecture: str) -> bool:
    """Return True if torchvision has this classification model."""
    return architecture in names()


def options_for(architecture: str, image_size: int | None) -> dict[str, Any]:
    """Return the arguments of the builder: those that torchvision uses with its default weights."""
    if not architecture.startswith("vit_"):
        return dict(OPTIONS.get(architecture, {}))
    return {"image_size": models.get_model_weights(architecture).DEFAULT.meta["min_size"][0]}


def build(architecture: str, *, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """Return torchvision's own model.

    Raises
    ------
    OSError    `pretrained`, and the server cannot be reached
    """
    state = None
    if pretrained:
        with redirect_stdout(sys.stderr):  # torch announces the download on stdout
            state = models.get_model_weights(architecture).DEFAULT.get_state_dict(progress=False, check_hash=True)
    model: nn.Module = models.get_model(architecture, weights=None, **options)
    if state is not None:
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(AUXILIARY)})
    return model


def origin_of(architecture: str) -> tuple[str, tuple[Path, ...] | None]:
    """Return the URL of the pretrained weights, and the downloaded file; None if it is not there."""
    url = models.get_model_weights(architecture).DEFAULT.url
    file = Path(hub.get_dir(), "checkpoints", PurePath(url).name)
    return f"hub: {url}", (file,) if file.is_file() else None


def classifiers_of(architecture: str, model: nn.Module) -> tuple[str, ...]:
    """Return the last linear layer or convolution, and the auxiliary classifiers."""
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return (weighted[-1], *AUXILIARY)


def transform_for(
    architecture: str, image_size: int | None, crop_pct: float | None, interpolation: str | None
) -> Transform:
    """Return the transform of the default weights; another `image_size` keeps their ratio of crop to resize."""
    preset = models.get_model_weights(architecture).DEFAULT.transforms()
    default = preset.crop_size[0]
    crop = image_size or default
    resize = round(crop / crop_pct) if crop_pct else round(crop * preset.resize_size[0] / default)
    return Transform(
        crop_size=(crop, crop),
        resize_size=resize,
        resize_mode="short",
        interpolation=interpolation or preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def config_for(architecture: str, *, n_classes: int, transform: Any) -> dict[str, Any]:
    """Return no further entries of `config.json`: `get_model(architecture, **model_args)` needs none."""
    return {}


def open_folder(folder: Path) -> nn.Module:
    """Return the model in a folder, with its classifier, as users of torchvision open it."""
    config = json.loads((folder / "config.json").read_text())
    options = {"num_classes": config["num_classes"], **config["model_args"]}
    model = build(config["architecture"], options=options, pretrained=False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()

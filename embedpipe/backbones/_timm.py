"""timm's models. `_torchvision` has the same functions.

>>> build("resnet18", options={}, pretrained=False)
"""

from __future__ import annotations

import math
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from timm.data import resolve_data_config
from torch import nn

from embedpipe.errors import WeightsUnavailable
from embedpipe.images import Transform


def names() -> list[str]:
    """Return the architectures, without pretrained tags."""
    return list(timm.list_models())


def knows(architecture: str) -> bool:
    """Return True if timm has this architecture, with or without a pretrained tag (`resnet18.a1_in1k`)."""
    try:
        return bool(timm.is_model(architecture)) and bool(timm.get_pretrained_cfg(architecture))
    except RuntimeError:  # an unknown tag
        return False


def options_for(architecture: str, image_size: int | None) -> dict[str, Any]:
    """Return the arguments of the builder: models with a fixed input size are built for the requested size."""
    fixed = timm.get_pretrained_cfg(architecture).fixed_input_size
    return {"img_size": image_size} if image_size and fixed else {}


def build(architecture: str, *, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """Return timm's own model.

    Raises
    ------
    WeightsUnavailable    `pretrained`, and timm publishes no weights
    OSError               `pretrained`, and the hub cannot be reached
    """
    if not pretrained:
        return _create(architecture, options)
    if not timm.get_pretrained_cfg(architecture).has_weights:
        message = f"timm publishes no pretrained weights for {architecture}"
        raise WeightsUnavailable(message, hint="use --weights FILE or --weights none")
    with _fail_fast_offline():
        return _create(architecture, {"pretrained": True, **options})


def origin_of(architecture: str) -> tuple[str, tuple[Path, ...] | None]:
    """Return the hub entry of the pretrained weights, and their file in the hub's cache; None if it is not there."""
    cfg = timm.get_pretrained_cfg(architecture)
    origin = f"hub: {cfg.hf_hub_id or cfg.url}"
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    for name in (cfg.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(repository, name, revision=revision or None) if repository and name else None
        if isinstance(path, str):
            return origin, (Path(path),)
    return origin, None


def classifiers_of(architecture: str, model: nn.Module) -> tuple[str, ...]:
    """Return the classifiers in the order in which the default configuration names them."""
    named = timm.get_pretrained_cfg(architecture).classifier or ()
    return (named,) if isinstance(named, str) else tuple(named)


def transform_for(
    architecture: str, image_size: int | None, crop_pct: float | None, interpolation: str | None
) -> Transform:
    """Return timm's evaluation transform, from the default configuration."""
    overrides = {"img_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
    data = resolve_data_config(overrides, pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict())
    height, width = data["input_size"][1:]
    resized = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    mode = data["crop_mode"] if data["crop_mode"] in ("squash", "border") else "short"
    return Transform(
        crop_size=(height, width),
        resize_size=resized[0] if mode == "short" and resized[0] == resized[1] else resized,
        resize_mode=mode,
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def config_for(architecture: str, *, n_classes: int, transform: Any) -> dict[str, Any]:
    """Return the entries of `config.json` that only `timm.create_model("local-dir:FOLDER")` reads."""
    cfg = timm.get_pretrained_cfg(architecture).to_dict(remove_source=True, remove_null=True)
    cfg |= {"num_classes": n_classes, "tag": "embedpipe"}
    if isinstance(transform, Transform):
        height, width = transform.crop_size
        resized = transform.resize_size if isinstance(transform.resize_size, int) else transform.resize_size[0]
        crop_pct = height / resized
        while math.floor(height / crop_pct) < resized:  # the quotient may round down
            crop_pct = math.nextafter(crop_pct, 0)
        cfg |= {
            "input_size": [3, height, width],
            "crop_pct": crop_pct,
            "crop_mode": "center" if transform.resize_mode == "short" else transform.resize_mode,
            "interpolation": transform.interpolation,
            "mean": list(transform.mean),
            "std": list(transform.std),
        }
    return {"pretrained_cfg": cfg}


def open_folder(folder: Path) -> nn.Module:
    """Return the model in a folder, with its classifier, as users of timm open it."""
    return _create(f"local-dir:{folder}", {"pretrained": True}).eval()


def _create(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(architecture, **arguments)
    return model


@contextmanager
def _fail_fast_offline() -> Iterator[None]:
    """Set the hub client to offline mode if its host does not answer, which avoids 50 s of retries; its cache still works."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not _answers(hub.ENDPOINT)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _answers(endpoint: str, timeout_s: float = 5.0) -> bool:
    """Return True if the endpoint, or the proxy in front of it, accepts a connection."""
    url = urllib.parse.urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout_s).close()
    except OSError:
        return False
    return True

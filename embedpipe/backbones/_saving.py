"""Save a model in a folder that its own library reads, and that `load_model` turns into the same backbone again.

`save_model` writes three files: `model.safetensors` with the library's parameter names, `config.json` with what the library
reads, and `embedpipe.json` with the layer, pooling, transform and origin. If the library's own classifier is one linear layer
on the penultimate features, the new classifier is written under its names; otherwise only the backbone is written.

>>> save_model(backbone, weight, bias, ["cat", "dog"], folder)
>>> timm.create_model(f"local-dir:{folder}", pretrained=True)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from embedpipe.backbones._backbone import Backbone
from embedpipe.backbones._loading import CONFIG, DESCRIPTION, LIBRARIES, SCHEMA, WEIGHTS, read_description
from embedpipe.backbones._trace import MetaWeights
from embedpipe.backbones._weights import State
from embedpipe.storage import storage_errors


def save_model(
    backbone: Backbone, weight: np.ndarray | Tensor, bias: np.ndarray | Tensor, classes: Sequence[str], folder: Path
) -> bool:
    """Write a model into an existing folder; return whether the new classifier is part of it.

    Parameters
    ----------
    weight : float32 (C, D)
    bias : float32 (C,)
    classes : C names

    Raises
    ------
    StorageError    a file cannot be written
    """
    source, _, architecture = backbone.name.partition(":")
    own = backbone.module.model.state_dict()
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own.items()}
    head = _classifier_state(backbone, torch.as_tensor(weight), torch.as_tensor(bias))
    files = {WEIGHTS: safetensors.torch.save(state | head, {"format": "pt"})}
    if source in LIBRARIES:
        files[CONFIG] = _to_json(
            {
                "architecture": architecture.partition(".")[0],
                "num_classes": len(classes),
                "num_features": backbone.feature_dim,
                "label_names": list(classes),
                "model_args": backbone.spec["build"],
                **LIBRARIES[source].config_for(architecture, n_classes=len(classes), transform=backbone.transform),
            }
        )
    files[DESCRIPTION] = _to_json(_describe(backbone, sorted(head), classes))
    for name, data in files.items():
        with storage_errors(folder / name, "write"):
            (folder / name).write_bytes(data)
    return bool(head)


def open_saved_model(folder: Path) -> nn.Module:
    """Return the saved model with its classifier, opened by its library alone; only if `save_model` returned True."""
    return LIBRARIES[read_description(folder)["name"].partition(":")[0]].open_folder(folder)


def _classifier_state(backbone: Backbone, weight: Tensor, bias: Tensor) -> State:
    """Return the new classifier under the library's names; empty if the library has no single linear one on the features."""
    source, _, architecture = backbone.name.partition(":")
    if source not in LIBRARIES or backbone.module.hooks:
        return {}
    options = backbone.spec["build"] | {"num_classes": len(bias)}
    with MetaWeights():
        whole = LIBRARIES[source].build(architecture, options=options, pretrained=False).state_dict()
    own = backbone.module.model.state_dict()
    missing = {name.rpartition(".")[2]: (name, tensor.shape) for name, tensor in whole.items() if name not in own}
    head = {"weight": weight.float().contiguous(), "bias": bias.float().contiguous()}
    if len(whole) != len(own) + 2 or set(missing) != set(head):
        return {}
    if any(missing[kind][1].numel() != tensor.numel() for kind, tensor in head.items()):
        return {}
    return {missing[kind][0]: tensor.reshape(missing[kind][1]).clone() for kind, tensor in head.items()}


def _describe(backbone: Backbone, classifier: list[str], classes: Sequence[str]) -> dict[str, Any]:
    layer = backbone.spec["layer"]
    return {
        "schema": SCHEMA,
        "name": backbone.name,
        "layer": None if layer == "penultimate" else layer,
        "pool": backbone.spec["pool"] if layer != "penultimate" else "auto",
        "image_size": list(backbone.image_size),
        "transform": backbone.spec["transform"],
        "build": backbone.spec["build"],
        "classes": list(classes),
        "classifier": classifier,
        "origin": backbone.origin,
        "spec": backbone.spec,
    }


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

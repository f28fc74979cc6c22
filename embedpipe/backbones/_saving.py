"""A model on disk that its own library reads, and that `load_model` turns into the same backbone again.

`model.safetensors` holds the library's parameter names, `config.json` what the library wants to
know, `embedpipe.json` the rest.

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

from embedpipe.backbones._assembling import Images, assemble
from embedpipe.backbones._backbone import Backbone
from embedpipe.backbones._libraries import LIBRARIES
from embedpipe.backbones._state import State, fill, read_weights
from embedpipe.backbones._trace import Weightless
from embedpipe.errors import ModelMismatch, StorageError
from embedpipe.images import Transform
from embedpipe.storage import PathLike

SCHEMA = 1
FIELDS = {
    "name": str,
    "layer": str | None,
    "pool": str,
    "image_size": list,
    "transform": dict | str,
    "build": dict,
    "origin": str,
}
DESCRIPTION, CONFIG, WEIGHTS = "embedpipe.json", "config.json", "model.safetensors"


def save_model(
    backbone: Backbone, weight: np.ndarray | Tensor, bias: np.ndarray | Tensor, classes: Sequence[str], folder: Path
) -> bool:
    """Write the whole model into an existing folder; tell whether the library's own classifier could take the new one.

    It can where one linear classifier acts on the penultimate features; elsewhere only the backbone is written.

    Parameters
    ----------
    weight : float32 (C, D)
    bias : float32 (C,)
    classes : C names

    Raises
    ------
    StorageError    the operating system refused
    """
    source, _, architecture = backbone.name.partition(":")
    state = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.module.model.state_dict().items()
    }
    head = _classifier_state(backbone, torch.as_tensor(weight), torch.as_tensor(bias))
    files = {WEIGHTS: safetensors.torch.save(state | head, {"format": "pt"})}
    if source in LIBRARIES:
        library, n_classes = LIBRARIES[source], len(classes)
        config = {
            "architecture": library.bare_name(architecture),
            "num_classes": n_classes,
            "num_features": backbone.feature_dim,
            "label_names": list(classes),
            "model_args": backbone.build,
            **library.config_for(architecture, n_classes=n_classes, transform=backbone.transform),
        }
        files[CONFIG] = _to_json(config)
    files[DESCRIPTION] = _to_json(_description(backbone, sorted(head), classes))
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as exc:
        raise StorageError(
            f"could not write {exc.filename}: {exc.strerror}", hint="free some space or check the permissions"
        ) from exc
    return bool(head)


def load_model(
    folder: PathLike, *, layer: str | None = None, pool: str = "auto", transform: Images | None = None
) -> Backbone:
    """Return the backbone in a folder that `save_model` wrote, at the layer it was saved with or at another one.

    Raises
    ------
    ModelMismatch    not such a folder, a newer format, or weights of another model
    UsageError       unknown layer or pool
    """
    root = Path(folder)
    stored = _read_description(root)
    source, _, architecture = stored["name"].partition(":")
    if source not in LIBRARIES:
        raise ModelMismatch(
            f"{root} holds the weights of {stored['name']}, a module of your own",
            hint="load them into your module and pass it to load_backbone",
        )
    library = LIBRARIES[source]
    height = stored["image_size"][0]
    if not library.knows(architecture) or stored["build"] not in ({}, library.options_for(architecture, height)):
        raise ModelMismatch(
            f"{root} names {stored['name']} built with {stored['build']}, which is no model of {source}",
            hint="update timm and torchvision, or save the model again",
        )
    model = library.build(architecture, options=stored["build"], pretrained=False)
    heads = library.classifiers_of(architecture, model)
    state = read_weights(root / WEIGHTS)
    fill(model, state, heads=heads, source=str(root), name=stored["name"])
    return assemble(
        model,
        name=stored["name"],
        heads=heads,
        layer=layer or stored["layer"],
        pool=pool if layer else stored["pool"],
        transform=transform or _transform_of(stored, root),
        image_size=tuple(stored["image_size"]),
        origin=stored["origin"],
        build=stored["build"],
        files=(root.absolute() / DESCRIPTION, root.absolute() / WEIGHTS),
    )


def open_whole(folder: Path) -> nn.Module:
    """Return the model with the new classifier, opened by its own library alone; only where `save_model` said yes."""
    return LIBRARIES[_read_description(folder)["name"].partition(":")[0]].open_folder(folder)


def _transform_of(stored: dict[str, Any], folder: Path) -> Transform:
    try:
        return Transform.from_dict(stored["transform"])
    except (ValueError, TypeError, AttributeError) as exc:
        raise ModelMismatch(
            f"{folder} has a transform that cannot be applied any more: {exc}",
            hint="extract and fine-tune again, or pass transform=",
        ) from exc


def _classifier_state(backbone: Backbone, weight: Tensor, bias: Tensor) -> State:
    """Return the new classifier under the library's names, nothing where it has no single linear one on the features."""
    source, _, architecture = backbone.name.partition(":")
    if source not in LIBRARIES or backbone.module.taps:
        return {}
    options = backbone.build | {"num_classes": len(bias)}
    with Weightless():
        whole = LIBRARIES[source].build(architecture, options=options, pretrained=False).state_dict()
    own = backbone.module.model.state_dict()
    missing = {name: tensor.shape for name, tensor in whole.items() if name not in own}
    return _fit_classifier(missing, weight.float(), bias.float())


def _fit_classifier(missing: dict[str, torch.Size], weight: Tensor, bias: Tensor) -> State:
    given = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    kinds = {name.rpartition(".")[2]: name for name in missing}
    if len(missing) != 2 or set(kinds) != set(given):
        return {}
    if any(missing[kinds[kind]].numel() != tensor.numel() for kind, tensor in given.items()):
        return {}
    return {kinds[kind]: tensor.reshape(missing[kinds[kind]]).clone() for kind, tensor in given.items()}


def _description(backbone: Backbone, classifier: list[str], classes: Sequence[str]) -> dict[str, Any]:
    layer = backbone.spec["layer"]
    return {
        "schema": SCHEMA,
        "name": backbone.name,
        "layer": None if layer == "penultimate" else layer,
        "pool": backbone.spec["pool"] if layer != "penultimate" else "auto",
        "image_size": list(backbone.image_size),
        "transform": backbone.spec["transform"],
        "build": backbone.build,
        "classes": list(classes),
        "classifier": classifier,
        "origin": backbone.origin,
        "spec": backbone.spec,
    }


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelMismatch(f"{folder} holds no model of embedpipe", hint=f"expected a {DESCRIPTION} in it") from exc
    found = stored.get("schema") if isinstance(stored, dict) else None
    if found != SCHEMA:
        raise ModelMismatch(
            f"{folder} has the format {found}, this version reads {SCHEMA}", hint="use a newer embedpipe"
        )
    wrong = [name for name, kind in FIELDS.items() if not isinstance(stored.get(name), kind)]
    if wrong or [type(side) for side in stored["image_size"]] != [int, int]:
        raise ModelMismatch(f"{folder / DESCRIPTION} has no sound {', '.join(wrong) or 'image_size'}")
    return stored


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

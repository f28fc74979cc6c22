"""Cache the features of a frozen backbone once, train heads on them in seconds, fine-tune from there.

>>> import embedpipe as ep
>>> features = ep.extract("data/", "timm:resnet18", cache_dir="cache")
>>> head = ep.fit_head(features)
>>> tuned = ep.finetune(head, unfreeze="layer4")
>>> tuned.predict(["a.jpg"])

Names are imported when they are first used: importing embedpipe loads no torch.
"""

# ruff: noqa: F401  (names for editors)
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedpipe.advising import Advice, advise
    from embedpipe.auditing import Audit, audit
    from embedpipe.backbones import Backbone, Layer, list_models, load_backbone
    from embedpipe.caretaking import collect_garbage, describe_space, export_features, list_cache, remove_from_cache
    from embedpipe.classifier import Classifier
    from embedpipe.comparing import Comparison, compare
    from embedpipe.errors import EmbedpipeError
    from embedpipe.evaluation import Evaluation, evaluate
    from embedpipe.exporting import Exported, export
    from embedpipe.extraction import extract
    from embedpipe.features import FeatureSet
    from embedpipe.finetuning import finetune
    from embedpipe.fitting import fit_head
    from embedpipe.heads import LinearHead
    from embedpipe.images import Transform
    from embedpipe.prediction import Prediction, predict
    from embedpipe.proving import explain_reuse, verify_cache

_ROOMS = {
    "advising": ("Advice", "advise"),
    "auditing": ("Audit", "audit"),
    "backbones": ("Backbone", "Layer", "list_models", "load_backbone"),
    "caretaking": ("collect_garbage", "describe_space", "export_features", "list_cache", "remove_from_cache"),
    "classifier": ("Classifier",),
    "comparing": ("Comparison", "compare"),
    "errors": ("EmbedpipeError",),
    "evaluation": ("Evaluation", "evaluate"),
    "exporting": ("Exported", "export"),
    "extraction": ("extract",),
    "features": ("FeatureSet",),
    "finetuning": ("finetune",),
    "fitting": ("fit_head",),
    "heads": ("LinearHead",),
    "images": ("Transform",),
    "prediction": ("Prediction", "predict"),
    "proving": ("explain_reuse", "verify_cache"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embedpipe' has no attribute {name!r}")
    return getattr(import_module(f"embedpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

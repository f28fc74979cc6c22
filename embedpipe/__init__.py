"""Cache the features of a frozen backbone once, train heads on them in seconds, fine-tune from there.

>>> import embedpipe as ep
>>> features = ep.extract("data/", "timm:resnet18", cache_dir="cache")
>>> head = ep.fit_head(features)
>>> tuned = ep.finetune(head, unfreeze="layer4")
>>> tuned.predict(["a.jpg"])

Names are imported when they are first used: importing embedpipe loads no torch.
"""

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

_HOMES = {
    "Advice": "advising",
    "Audit": "auditing",
    "Backbone": "backbones",
    "Classifier": "classifier",
    "Comparison": "comparing",
    "EmbedpipeError": "errors",
    "Evaluation": "evaluation",
    "Exported": "exporting",
    "FeatureSet": "features",
    "Layer": "backbones",
    "LinearHead": "heads",
    "Prediction": "prediction",
    "Transform": "images",
    "advise": "advising",
    "audit": "auditing",
    "collect_garbage": "caretaking",
    "compare": "comparing",
    "describe_space": "caretaking",
    "evaluate": "evaluation",
    "explain_reuse": "proving",
    "export": "exporting",
    "export_features": "caretaking",
    "extract": "extraction",
    "finetune": "finetuning",
    "fit_head": "fitting",
    "list_cache": "caretaking",
    "list_models": "backbones",
    "load_backbone": "backbones",
    "predict": "prediction",
    "remove_from_cache": "caretaking",
    "verify_cache": "proving",
}
__all__ = [
    "Advice",
    "Audit",
    "Backbone",
    "Classifier",
    "Comparison",
    "EmbedpipeError",
    "Evaluation",
    "Exported",
    "FeatureSet",
    "Layer",
    "LinearHead",
    "Prediction",
    "Transform",
    "advise",
    "audit",
    "collect_garbage",
    "compare",
    "describe_space",
    "evaluate",
    "explain_reuse",
    "export",
    "export_features",
    "extract",
    "finetune",
    "fit_head",
    "list_cache",
    "list_models",
    "load_backbone",
    "predict",
    "remove_from_cache",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embedpipe' has no attribute {name!r}")
    return getattr(import_module(f"embedpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

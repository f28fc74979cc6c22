"""Cache the features of a frozen backbone once, train heads on them in seconds, fine-tune from there.

>>> import embedpipe as ep
>>> features = ep.extract("data/", "timm:resnet18", cache_dir="cache")
>>> head = ep.fit_head(features)
>>> tuned = ep.finetune(head, unfreeze="layer4")
>>> tuned.predict(["a.jpg"])

Names are imported at first use, so `import embedpipe` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone, Layer, list_models, load_backbone
    from embedpipe.classifier import Classifier
    from embedpipe.commands.advise import Advice, advise
    from embedpipe.commands.audit import Audit, audit
    from embedpipe.commands.cache import collect_garbage, describe_space, export_features, list_cache, remove_from_cache
    from embedpipe.commands.compare import Comparison, compare
    from embedpipe.commands.evaluate import Evaluation, evaluate
    from embedpipe.commands.export import Exported, export
    from embedpipe.commands.extract import extract
    from embedpipe.commands.finetune import finetune
    from embedpipe.commands.fit_head import fit_head
    from embedpipe.commands.predict import Prediction, predict
    from embedpipe.commands.verify import explain_reuse, verify_cache
    from embedpipe.errors import EmbedpipeError
    from embedpipe.features import FeatureSet
    from embedpipe.heads import LinearHead
    from embedpipe.images import Transform

_MODULES = {
    "backbones": ("Backbone", "Layer", "list_models", "load_backbone"),
    "classifier": ("Classifier",),
    "commands.advise": ("Advice", "advise"),
    "commands.audit": ("Audit", "audit"),
    "commands.cache": ("collect_garbage", "describe_space", "export_features", "list_cache", "remove_from_cache"),
    "commands.compare": ("Comparison", "compare"),
    "commands.evaluate": ("Evaluation", "evaluate"),
    "commands.export": ("Exported", "export"),
    "commands.extract": ("extract",),
    "commands.finetune": ("finetune",),
    "commands.fit_head": ("fit_head",),
    "commands.predict": ("Prediction", "predict"),
    "commands.verify": ("explain_reuse", "verify_cache"),
    "errors": ("EmbedpipeError",),
    "features": ("FeatureSet",),
    "heads": ("LinearHead",),
    "images": ("Transform",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embedpipe' has no attribute {name!r}")
    return getattr(import_module(f"embedpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

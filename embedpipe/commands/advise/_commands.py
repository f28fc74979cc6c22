"""The commands that carry out an option, as a user would type them.

>>> format_commands(option, features, evidence, epochs=10, runs_dir=Path("runs"))
('embedpipe fit-head pets-0123 --backbone timm:resnet18 --layer penultimate',)
"""

from __future__ import annotations

import shlex
from pathlib import Path

from embedpipe.cache import Cache, Space
from embedpipe.commands.advise._decision import Option
from embedpipe.commands.advise._measurement import Evidence
from embedpipe.commands.advise._preparation import is_sibling
from embedpipe.commands.advise._verification import training_options
from embedpipe.features import FeatureSet, feature_spaces

EXTRACT_DEFAULTS = {"weights": "pretrained", "pool": "auto", "seed": 0}
NO_FLAGS = ("layer", "name", "pixels")


def format_commands(
    option: Option, features: FeatureSet, evidence: Evidence, epochs: int, runs_dir: Path
) -> tuple[str, ...]:
    """Return the command lines that carry out an option."""
    cache_dir = features.space.folder.parent.parent
    cache_flags = [] if str(cache_dir) == "cache" else ["--cache-dir", str(cache_dir)]
    folders = cache_flags + ([] if str(runs_dir) == "runs" else ["--runs-dir", str(runs_dir)])
    data = [features.dataset, *folders]
    last_layer = _space_flags(features, evidence.last.layers)
    if option.action.startswith("fix-") or option.action == "more-data":  # manual work, then the same steps again
        sources = [source.absolute for source in features.manifest.sources]
        lines = [["extract", *sources, *_loader_flags(features), *cache_flags], ["advise", *data]]
        lines = lines if option.action == "more-data" else [["audit", *data, *last_layer], *lines]
    elif option.action.startswith("finetune"):
        training = {"epochs": epochs, **training_options(option, evidence.n_train)}
        tune = ["finetune", "--unfreeze", *(option.layers or ("all",)), *_flags(training), *folders]
        lines = [["fit-head", *data, *last_layer], tune]
    else:
        lines = [["fit-head", *data, *_space_flags(features, option.layers)]]
    return tuple(shlex.join(["embedpipe", *line]) for line in lines)


def _space_flags(features: FeatureSet, layers: tuple[str, ...]) -> list[str]:
    """Return --backbone and --layer, or --space where these match other spaces of the cache too."""

    def name(space: Space) -> str:
        return f"{space.spec['source']}:{space.spec['architecture']}"

    own, cache = features.space, Cache(features.space.folder.parent.parent)
    if any(name(other) == name(own) and not is_sibling(other, own) for other in feature_spaces(cache)):
        folders = [space.folder.name for space in features.spaces if space.spec["layer"] in layers]
        return [word for folder in folders for word in ("--space", folder)]
    return ["--backbone", name(own), *(word for layer in layers for word in ("--layer", layer))]


def _loader_flags(features: FeatureSet) -> list[str]:
    """Return the options of `extract` that do not have their default."""
    loader = features.loader
    changed = {k: v for k, v in loader.items() if k not in NO_FLAGS and v and v != EXTRACT_DEFAULTS.get(k)}
    return _flags({"backbone": loader["name"], **changed} if loader.get("name") else changed)


def _flags(options: dict[str, object]) -> list[str]:
    return [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]

"""Which parameters train and which modules stay in eval mode, from the layer names, globs and numbers of `--unfreeze`.

>>> unfreeze_parameters(backbone, ["layer4"])
('layer4.0.conv1.weight', ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from embedpipe.backbones._backbone import Backbone
from embedpipe.backbones._trace import is_below, layer_hint, owner_of
from embedpipe.errors import UsageError


def unfreeze_parameters(backbone: Backbone, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of `backbone.module.model` that the patterns unfreeze, in the model's order.

    Parameters
    ----------
    patterns : name of a layer    its modules and everything executed after them
               a glob             exactly the parameters, or modules' parameters, that it matches
               a number N         the last N stages of `backbone.layers`
               "P%"               the last P percent of the modules that hold parameters, rounded up
               "all", "none"      everything; nothing

    Raises
    ------
    UsageError    a pattern that matches no parameter
    """
    chosen = {name for pattern in patterns for name in _matches(backbone, pattern)}
    return tuple(name for name in _parameters(backbone) if name in chosen)


def frozen_modules(backbone: Backbone, unfrozen: Sequence[str]) -> tuple[nn.Module, ...]:
    """Return the modules to keep in eval mode while the named parameters train.

    They are the largest modules without an unfrozen parameter; those without any parameter (dropout, stochastic depth)
    count as frozen where they run before the first unfrozen one. The rest of the model may be in train mode.
    """
    trace, training = backbone.trace, set(unfrozen)
    first = min((trace.start_of(owner_of(name)) for name in training), default=len(trace.modules))

    def frozen_in(module: nn.Module, prefix: str) -> list[nn.Module]:
        owned = {name for name, _ in module.named_parameters(prefix)}
        if owned and not owned & training:
            return [module]
        if not owned:
            start = trace.start_below(prefix)
            return [module] if start is None or start < first else []
        return [m for name, child in module.named_children() for m in frozen_in(child, f"{prefix}.{name}".lstrip("."))]

    return tuple(frozen_in(backbone.module.model, ""))


def _matches(backbone: Backbone, pattern: str) -> list[str]:
    names = _parameters(backbone)
    if pattern in ("all", "none"):
        return names if pattern == "all" else []
    if pattern.isdecimal():
        return _last_stages(backbone, int(pattern))
    if pattern.endswith("%"):
        return _last_percent(backbone, pattern)
    matching = _from(backbone, pattern)
    if any(character in pattern for character in "*?["):
        matching = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
    if not matching:
        modules = [name for name, module in backbone.module.model.named_modules() if name and [*module.parameters()]]
        hint = layer_hint(pattern, modules)
        raise UsageError(f"no parameter of {backbone.name} matches {pattern!r}", hint=hint)
    return matching


def _last_stages(backbone: Backbone, count: int) -> list[str]:
    stages = backbone.layers
    if count > len(stages):
        message = f"cannot unfreeze {count} stages: {backbone.name} has {len(stages)}"
        raise UsageError(message, hint="use 'all', or fewer stages")
    return _from(backbone, stages[-count].name) if count else []


def _last_percent(backbone: Backbone, pattern: str) -> list[str]:
    try:
        share = float(pattern.removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UsageError(f"cannot unfreeze {pattern!r}", hint="expected 0% to 100%")
    names = _parameters(backbone)
    owners = sorted({owner_of(name) for name in names}, key=backbone.trace.start_of)
    last = {*owners[len(owners) - math.ceil(share * len(owners)) :]}
    return [name for name in names if owner_of(name) in last]


def _from(backbone: Backbone, prefix: str) -> list[str]:
    """Return the parameters below a prefix and those of all modules that start after it does."""
    trace, start = backbone.trace, backbone.trace.start_below(prefix)
    later = {n for n in _parameters(backbone) if start is not None and trace.start_of(owner_of(n)) >= start}
    return [n for n in _parameters(backbone) if n in later or is_below(n, prefix)]


def _parameters(backbone: Backbone) -> list[str]:
    return [name for name, _ in backbone.module.model.named_parameters()]

"""Which parameters train and which modules stay in eval mode, from names as a user writes them.

>>> unfreeze_parameters(backbone, ["layer4"])
('layer4.0.conv1.weight', ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from embedpipe.backbones._backbone import Backbone
from embedpipe.backbones._trace import is_below, owner_of
from embedpipe.errors import UsageError
from embedpipe.provenance import nearest


def unfreeze_parameters(backbone: Backbone, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of `backbone.module.model` that the patterns unfreeze, in the model's order.

    Parameters
    ----------
    patterns : a layer's name    its modules and everything executed after them
               a glob            exactly the parameters, or modules' parameters, that it matches
               a number N        the last N stages of `backbone.layers`
               "P%"              the last P percent of the modules that hold parameters, rounded up
               "all", "none"     everything; nothing

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
    record, wanted = backbone.trace, set(unfrozen)
    first = min((record.start_of(owner_of(name)) for name in wanted), default=len(record.visits))

    def frozen_in(module: nn.Module, prefix: str) -> list[nn.Module]:
        owned = {name for name, _ in module.named_parameters(prefix)}
        if owned and not owned & wanted:
            return [module]
        if not owned:
            start = record.start_below(prefix)
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
    globbed = any(character in pattern for character in "*?[")
    found = [n for n in names if _is_globbed(n, pattern)] if globbed else _from(backbone, pattern)
    if not found:
        modules = [name for name, one in backbone.module.model.named_modules() if name and [*one.parameters()]]
        close = nearest(pattern, modules)
        raise UsageError(
            f"nothing to unfreeze in {backbone.name} matches {pattern!r}",
            hint=f"did you mean {' or '.join(map(repr, close))}?" if close else "see `embedpipe layers`",
            pattern=pattern,
        )
    return found


def _last_stages(backbone: Backbone, count: int) -> list[str]:
    if count > len(backbone.layers):
        raise UsageError(
            f"{count} stages to unfreeze, {backbone.name} has {len(backbone.layers)}", hint="use 'all', or fewer stages"
        )
    return _from(backbone, backbone.layers[-count].name) if count else []


def _last_percent(backbone: Backbone, pattern: str) -> list[str]:
    try:
        share = float(pattern.removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UsageError(f"{pattern!r} to unfreeze", hint="expected 0% to 100%")
    names = _parameters(backbone)
    owners = sorted({owner_of(name) for name in names}, key=backbone.trace.start_of)
    kept = {*owners[len(owners) - math.ceil(share * len(owners)) :]}
    return [name for name in names if owner_of(name) in kept]


def _from(backbone: Backbone, prefix: str) -> list[str]:
    """Return the parameters below a prefix and those of all modules that start after it does."""
    start = backbone.trace.start_below(prefix)
    if start is None:
        return [name for name in _parameters(backbone) if is_below(name, prefix)]
    return [n for n in _parameters(backbone) if is_below(n, prefix) or backbone.trace.start_of(owner_of(n)) >= start]


def _is_globbed(parameter: str, pattern: str) -> bool:
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def _parameters(backbone: Backbone) -> list[str]:
    return [name for name, _ in backbone.module.model.named_parameters()]

"""The two libraries behind one seam, and the grammar of names: `timm:NAME`, `torchvision:NAME`, bare = timm.

>>> resolve_name("resnet18")
('timm', 'resnet18')
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from embedpipe.backbones import _timm, _torchvision
from embedpipe.errors import UsageError
from embedpipe.images import Transform
from embedpipe.provenance import nearest


class Library(Protocol):
    """What `_timm` and `_torchvision` both offer."""

    AUXILIARY: tuple[str, ...]

    def names(self) -> list[str]: ...
    def knows(self, architecture: str) -> bool: ...
    def bare_name(self, architecture: str) -> str: ...
    def options_for(self, architecture: str, image_size: int | None) -> dict[str, Any]: ...
    def build(self, architecture: str, *, options: dict[str, Any], pretrained: bool) -> nn.Module: ...
    def origin_of(self, architecture: str) -> str: ...
    def files_of(self, architecture: str) -> tuple[Path, ...] | None: ...
    def classifiers_of(self, architecture: str, model: nn.Module) -> tuple[str, ...]: ...
    def transform_for(
        self, architecture: str, *, image_size: int | None, crop_pct: float | None, interpolation: str | None
    ) -> Transform: ...
    def config_for(self, architecture: str, *, n_classes: int, transform: Any) -> dict[str, Any]: ...
    def open_folder(self, folder: Path) -> nn.Module: ...


LIBRARIES: dict[str, Library] = {"timm": _timm, "torchvision": _torchvision}


def list_models(pattern: str | None = None) -> list[str]:
    """Return the classification models of both libraries, those that hold or (as a glob) match `pattern`."""
    names = [f"{source}:{name}" for source, library in LIBRARIES.items() for name in library.names()]
    glob = pattern if pattern and any(c in pattern for c in "*?[") else f"*{pattern or ''}*"
    return [name for name in names if fnmatchcase(name, glob) or fnmatchcase(name.partition(":")[2], glob)]


def resolve_name(name: str) -> tuple[str, str]:
    """Split a model's name into library and architecture.

    Raises
    ------
    UsageError    no such model; the nearest names of both libraries are given
    """
    source, _, architecture = name.rpartition(":")
    source = source or "timm"
    if source in LIBRARIES and LIBRARIES[source].knows(architecture):
        return source, architecture
    close = [full for bare in nearest(architecture, _bare_names()) for full in _bare_names()[bare]]
    raise UsageError(
        f"no model {name!r} in timm or torchvision",
        hint=f"did you mean {' or '.join(close[:3])}?" if close else "see `embedpipe models`",
        model=name,
    )


def _bare_names() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for source, library in LIBRARIES.items():
        for name in library.names():
            found.setdefault(name, []).append(f"{source}:{name}")
    return found

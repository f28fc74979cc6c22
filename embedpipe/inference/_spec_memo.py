"""Memo of the specs of backbones: which space an extraction fills, without loading the model.

The key holds all arguments, the library versions and the machine. An entry is valid while the weights files that were
read have not changed. A lost entry costs time only.

>>> known = recall(index, spec_key(loader, settings))
>>> spec = known["spec"] if known else load_backbone(**loader).spec
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpipe.cache import KeyIndex
from embedpipe.provenance import canonical_json, environment

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

FORMAT = 1
RACY_S = 2.0  # a younger file may change again within the resolution of its mtime
VISIBLE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # they change device and threads


def spec_key(loader: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return what identifies the space of an extraction before a model is loaded.

    Parameters
    ----------
    loader : dict      keyword arguments of `load_backbone`
    settings : dict    precision, stored dtype, device and what else is recorded of the environment
    """
    names = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in loader.items()}
    here = [os.getcwd(), platform.node(), *(os.environ.get(name) for name in VISIBLE)]
    return canonical_json([FORMAT, names, dict(settings), here, environment("")])


def remember(index: KeyIndex, key: str | None, backbone: Backbone, **facts: Any) -> None:
    """Store facts of a backbone (JSON values), if it has a key, and its weights files are known and old enough."""
    stats = [(str(file), _stat(file)) for file in backbone.files or ()]
    young = any(stat is None or max(stat[1], stat[3]) > time.time_ns() - RACY_S * 1e9 for _, stat in stats)
    if key and backbone.files is not None and not young:
        index.put_text(key, json.dumps({**facts, "files": stats}))


def recall(index: KeyIndex, key: str | None) -> dict[str, Any] | None:
    """Return what `remember` stored; None if that is nothing, or a weights file has changed."""
    if key is None:
        return None
    try:
        fields: dict[str, Any] = json.loads(index.get_text(key) or "null")
        unchanged = all(_stat(Path(file)) == stat for file, stat in fields.pop("files"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return fields if unchanged else None


def _stat(file: Path) -> list[int] | None:
    with suppress(OSError):
        status = os.stat(file)
        return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
    return None

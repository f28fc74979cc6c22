"""Recall: which space an extraction fills, told without loading a model where nothing has changed since one was loaded.

What is remembered belongs to a question (all arguments, library versions, machine) and to the weights files as they
were, so that a changed one is an unknown one. Forgetting costs time only.

>>> known = recall(index, question_of(loader, settings))
>>> known.spec["architecture"] if known else load_backbone(**loader)
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpipe.cache import KeyIndex
from embedpipe.provenance import canonical_json, environment

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

FORMAT = 1
RACY_S = 2.0  # a younger file may change again within one tick of its mtime
VISIBLE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # they change device and threads


@dataclass(frozen=True)
class Recalled:
    """name : str, the backbone's; spec : dict, the space's; record : dict, the environment as it was recorded."""

    name: str
    spec: dict[str, Any]
    record: dict[str, Any]


def question_of(loader: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return what identifies an extraction's space, before any model is loaded.

    Parameters
    ----------
    loader : dict      keyword arguments of `load_backbone`
    settings : dict    precision, stored dtype, device and what else goes into the record of the environment
    """
    names = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in loader.items()}
    here = [os.getcwd(), platform.node(), *(os.environ.get(name) for name in VISIBLE)]
    return canonical_json([FORMAT, names, dict(settings), here, environment("")])


def remember(index: KeyIndex, question: str, backbone: Backbone, spec: Mapping[str, Any], record: Any) -> None:
    """Keep the answer for `recall`, if it is known which files the weights came from and they are settled."""
    _keep(index, question, backbone, {"name": backbone.name, "spec": dict(spec), "record": dict(record)})


def recall(index: KeyIndex, question: str) -> Recalled | None:
    """Return what was remembered, None where nothing was or a weights file is another one now."""
    with suppress(TypeError):
        fields = _find(index, question)
        return Recalled(**fields) if fields else None
    return None


def remember_layers(index: KeyIndex, question: str, backbone: Backbone) -> None:
    """Keep the names of a model's stages for `recall_layers`, under the same conditions."""
    _keep(index, question, backbone, {"layers": [layer.name for layer in backbone.layers]})


def recall_layers(index: KeyIndex, question: str) -> tuple[str, ...] | None:
    """Return the names of a model's stages, None where they are not remembered."""
    fields = _find(index, question)
    return tuple(fields["layers"]) if fields and "layers" in fields else None


def _keep(index: KeyIndex, question: str, backbone: Backbone, answer: Mapping[str, Any]) -> None:
    stats = [(str(file), _stat(file)) for file in backbone.files or ()]
    young = any(stat is None or max(stat[1], stat[3]) > time.time_ns() - RACY_S * 1e9 for _, stat in stats)
    if backbone.files is not None and not young:
        index.put_text(question, json.dumps({**answer, "files": stats}))


def _find(index: KeyIndex, question: str) -> dict[str, Any] | None:
    answer = index.get_text(question)
    if answer is None:
        return None
    try:
        fields: dict[str, Any] = json.loads(answer)
        same = all(_stat(Path(file)) == stat for file, stat in fields.pop("files"))
    except (ValueError, TypeError, KeyError):
        return None
    return fields if same else None


def _stat(file: Path) -> list[int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]

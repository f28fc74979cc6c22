"""LinearHead: weight, bias and class names, the standardiser folded in; NumPy only.

>>> head = LinearHead.load("runs/20250101-fit-head-ab12")
>>> head.predict_proba(X).argmax(axis=1)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.data import TASK_OF_COLUMN
from embedpipe.errors import ModelMismatch
from embedpipe.heads._files import entry, read_head, save_head
from embedpipe.heads._problem import ChunkedFeatures, Float32, Float64, affine, log_normaliser


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A linear model on raw features.

    Parameters
    ----------
    weight : float32 (C, D)      two classes: the rows -w/2 and +w/2 of their one logit; float64 for numbers, which may be large
    bias : float32 (C,)          float64 for numbers
    classes : tuple of str       row c scores classes[c]
    provenance : dict            JSON-able: how it was fitted, on what
    task : str                   what the logits mean. "single": softmax over classes; "multilabel": a sigmoid for each label;
                                 "regression": the number itself

    Raises
    ------
    ModelMismatch    shapes that do not match, or an unknown task
    """

    weight: Float32
    bias: Float32
    classes: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    task: str = "single"

    kind = "linear"

    def __post_init__(self) -> None:
        rows = len(self.classes)
        if self.weight.ndim != 2 or len(self.weight) != rows or self.bias.shape != (rows,):
            raise ModelMismatch(f"weight {self.weight.shape} and bias {self.bias.shape} for {rows} classes")
        if self.task not in TASK_OF_COLUMN.values():
            raise ModelMismatch(f"a head for {self.task}, expected {', '.join(TASK_OF_COLUMN.values())}")

    @property
    def feature_dim(self) -> int:
        return int(self.weight.shape[1])

    def logits(self, X: ArrayLike | ChunkedFeatures) -> Float64:
        """Return X W' + b, float64 (N, C), for raw features (N, D).

        Raises
        ------
        ModelMismatch    features of another width
        """
        return affine(check_width(X, self.feature_dim), self.weight, self.bias)

    def predict_proba(self, X: ArrayLike | ChunkedFeatures) -> Float64:
        """Return probabilities, float64 (N, C): of classes, rows sum to 1; of labels, independent ones; or numbers (N, 1)."""
        logits = self.logits(X)
        if self.task == "regression":
            return logits
        if self.task == "multilabel":
            return np.asarray(np.exp(-np.logaddexp(0, -logits)))
        return np.asarray(np.exp(logits - log_normaliser(logits)[:, None]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `head.safetensors` and `head.json` into a folder."""
        record = {
            "kind": self.kind,
            "task": self.task,
            "classes": list(self.classes),
            "feature_dim": self.feature_dim,
            "provenance": self.provenance,
        }
        save_head(Path(folder), record, {"weight": self.weight, "bias": self.bias})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LinearHead:
        """Read what `save` wrote.

        Raises
        ------
        UsageError       no head in the folder
        ModelMismatch    another kind of head, or damaged files
        """
        record, arrays = read_head(Path(folder), cls.kind, ("weight", "bias"))
        classes, provenance = tuple(entry(record, "classes", list)), entry(record, "provenance", dict)
        task = record.get("task", "single")  # older heads have none
        head = cls(arrays["weight"], arrays["bias"], classes, provenance, task)
        check_width(arrays["weight"], entry(record, "feature_dim", int))
        return head


def check_width(X: ArrayLike | ChunkedFeatures, feature_dim: int) -> Any:
    """Return features as an array (N, D), or `ChunkedFeatures` features as they are.

    Raises
    ------
    ModelMismatch    features of another width
    """
    array = X if isinstance(X, ChunkedFeatures) else np.asarray(X)
    if array.ndim != 2 or array.shape[1] != feature_dim:
        hint = "use the backbone and layer that the head was fitted on"
        raise ModelMismatch(f"features of shape {array.shape}, expected (N, {feature_dim})", hint=hint)
    return array

"""KnnHead: nearest neighbours by cosine similarity, which vote with a temperature.

>>> fit_knn(X, y, classes=("cat", "dog"), k=20).predict_proba(X_new)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import UsageError
from embedpipe.evaluation import unit_rows
from embedpipe.heads._files import entry, read_head, save_head
from embedpipe.heads._problem import Float32, Float64, Int64, blocks
from embedpipe.heads._standardisation import check_labelled
from embedpipe.heads.linear import check_width


@dataclass(frozen=True, eq=False)
class KnnHead:
    """The training features themselves.

    Parameters
    ----------
    features : float32 (N, D)    unit length
    labels : int64 (N,)          class index
    classes : tuple of str
    k : int                      neighbours that vote, at most N
    temperature : float          a vote weighs exp(cosine / temperature)
    provenance : dict            JSON-able

    Source: Wu et al., CVPR 2018, section 3.4.
    """

    features: Float32
    labels: Int64
    classes: tuple[str, ...]
    k: int
    temperature: float
    provenance: dict[str, Any] = field(default_factory=dict)

    kind = "knn"
    task = "single"

    @property
    def feature_dim(self) -> int:
        return int(self.features.shape[1])

    def predict_proba(self, X: ArrayLike) -> Float64:
        """Return the shares of the votes, float64 (N, C), whose rows sum to 1."""
        queries = check_width(X, self.feature_dim)
        shares = np.zeros((len(queries), len(self.classes)))
        for rows in blocks(queries, row_numbers=len(self.features)):
            cosine = unit_rows(queries[rows].astype(np.float64)) @ self.features.T
            near = np.argpartition(-cosine, self.k - 1, axis=1)[:, : self.k]
            score = np.take_along_axis(cosine, near, axis=1).astype(np.float64) / self.temperature
            vote = np.exp(score - score.max(axis=1, keepdims=True))
            np.add.at(shares[rows], (np.arange(len(near))[:, None], self.labels[near]), vote)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def logits(self, X: ArrayLike) -> Float64:
        """Return log shares, float64 (N, C), finite also for a class without a vote."""
        return np.asarray(np.log(np.maximum(self.predict_proba(X), np.finfo(np.float64).tiny)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `head.safetensors` and `head.json` into a folder."""
        record = {
            "kind": self.kind,
            "classes": list(self.classes),
            "feature_dim": self.feature_dim,
            "k": self.k,
            "temperature": self.temperature,
            "provenance": self.provenance,
        }
        save_head(Path(folder), record, {"features": self.features, "labels": self.labels})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> KnnHead:
        """Read what `save` wrote; raises as `LinearHead.load` does."""
        record, arrays = read_head(Path(folder), cls.kind, ("features", "labels"))
        classes, provenance = tuple(entry(record, "classes", list)), entry(record, "provenance", dict)
        k, temperature = entry(record, "k", int), entry(record, "temperature", float)
        return cls(arrays["features"], arrays["labels"], classes, k, temperature, provenance)


def fit_knn(X: Float32, y: ArrayLike, *, classes: tuple[str, ...], k: int = 20, temperature: float = 0.07) -> KnnHead:
    """Return a head that holds the training features (N, D) and labels (N,); k is at most N.

    Raises
    ------
    UsageError           no sample, a label out of range, k or temperature not positive
    NonFiniteFeatures    X has NaN or inf; the first bad row is named
    """
    features, labels = check_labelled(X, y, len(classes))
    if k < 1 or not temperature > 0 or not len(labels):
        raise UsageError(f"k = {k}, temperature = {temperature} on {len(labels)} samples, expected all positive")
    provenance = {"solver": "knn", "n_train": len(labels)}
    k = min(k, len(labels))
    return KnnHead(unit_rows(features.astype(np.float64)), labels, tuple(classes), k, temperature, provenance)

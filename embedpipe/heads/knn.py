"""KnnHead: nearest neighbours by cosine similarity, which vote with a temperature.

>>> fit_knn(X, y, classes=("cat", "dog"), k=20).predict_proba(X_new)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import UsageError
from embedpipe.evaluation import negative_log, unit_rows
from embedpipe.heads._files import entry, read_head, save_head
from embedpipe.heads._problem import Float32, Float64, Fold, Int64, blocks
from embedpipe.heads._standardisation import check_labelled
from embedpipe.heads.linear import check_width

K, TEMPERATURE = 20, 0.07  # where there is nothing to select them on
KS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


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


def fit_knn(
    X: Float32, y: ArrayLike, *, classes: tuple[str, ...], k: int = K, temperature: float = TEMPERATURE
) -> KnnHead:
    """Return a head that holds the training features (N, D) and labels (N,); k is at most N.

    Raises
    ------
    UsageError           no sample, a label out of range, k or temperature not positive
    NonFiniteFeatures    X has NaN or inf; the first bad row is named
    """
    features, labels = check_labelled(X, y, len(classes))
    if k < 1 or not temperature > 0 or not len(labels):
        raise UsageError(f"k = {k}, temperature = {temperature} on {len(labels)} samples, expected all positive")
    k = min(k, len(labels))
    provenance = {"solver": "knn", "k": k, "temperature": temperature, "n_train": len(labels)}
    return KnnHead(unit_rows(features.astype(np.float64)), labels, tuple(classes), k, temperature, provenance)


def select_knn(
    folds: Sequence[Fold], n_classes: int, *, k: int | None = None, temperature: float | None = None
) -> tuple[int, float, Float64]:
    """Return the k of KS and the temperature of TEMPERATURES with the lowest log loss on held-out rows, where they are not given.

    Rows of a class that the training part of a fold lacks do not count. Ties go to the smaller k and temperature.

    Returns
    -------
    k, temperature, and the loss of each held-out row, float64 (n,)
    """
    options = [(one, other) for one in ([k] if k else KS) for other in ([temperature] if temperature else TEMPERATURES)]
    losses = np.concatenate([np.zeros((0, len(options))), *(_losses(one, n_classes, options) for one in folds)])
    if not len(losses):
        return k or K, temperature or TEMPERATURE, losses[:, 0]
    best = int(losses.mean(axis=0).argmin())
    return *options[best], losses[:, best]


def _losses(fold: Fold, n_classes: int, options: Sequence[tuple[int, float]]) -> Float64:
    """Return the loss of each held-out row for each k and temperature, (n, number of options)."""
    rows_in, labels = check_labelled(fold.X[:], fold.y, n_classes)
    queries, truth = check_labelled(fold.X_held_out[:], fold.y_held_out, n_classes)
    features, known = unit_rows(rows_in.astype(np.float64)), np.isin(truth, labels)
    queries, truth = queries[known], truth[known]
    losses = np.zeros((len(truth), len(options)))
    for rows in blocks(queries, row_numbers=len(features)):
        cosine = unit_rows(queries[rows].astype(np.float64)) @ features.T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, : max(k for k, _ in options)]
        score, own = np.take_along_axis(cosine, order, axis=1), labels[order] == truth[rows, None]
        for number, (k, temperature) in enumerate(options):
            vote = np.exp((score[:, :k] - score[:, :1]) / temperature)
            losses[rows, number] = negative_log((vote * own[:, :k]).sum(axis=1) / vote.sum(axis=1))
    return losses

"""A head on several blocks of features side by side, such as the layers of a backbone.

Each feature is standardised and each block then scaled by 1 / sqrt(its width), so that one of 2,048 features does not drown
one of 64: in the mean over train all blocks have rows of the same length, together that of D standardised features, so that
l2 keeps its meaning. What comes back are plain weights on the raw features.

>>> path = fit_blocks(X, y, X_val, y_val, widths=(64, 2048), classes=("cat", "dog"))
>>> path.head.predict_proba(X_new)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import UsageError
from embedpipe.heads._fits import Path, fit_linear, fit_path
from embedpipe.heads._frame import check_labelled, measure
from embedpipe.heads._problem import Chunked, Float32, Float64, blocks
from embedpipe.heads.linear import LinearHead


@dataclass(frozen=True, eq=False)
class Scale:
    """(x - mean) * factor, both float64 (D,): what a solver is given instead of raw features."""

    mean: Float64
    factor: Float64

    @classmethod
    def of(cls, X: Float32, widths: Sequence[int], *, standardize: bool) -> Scale:
        """Measure training features (N, D) of blocks of these widths."""
        if sum(widths) != X.shape[1]:
            raise UsageError(f"blocks of {sum(widths)} features together, expected {X.shape[1]}")
        mean, std = np.zeros(X.shape[1]), np.ones(X.shape[1])
        for end, width in zip(np.cumsum(widths), widths, strict=True) if standardize else ():
            columns = slice(end - width, end)
            mean[columns], std[columns] = measure(X[:, columns])  # apart: one may be of another scale
        return cls(mean, np.repeat(block_scales(widths), widths) / std)

    def __call__(self, X: ArrayLike) -> Float32:
        features = np.asarray(X, dtype=np.float32)
        scaled = np.empty_like(features)
        for rows in blocks(features):
            scaled[rows] = (features[rows] - self.mean) * self.factor
        return scaled

    def fold(self, head: LinearHead, widths: Sequence[int]) -> LinearHead:
        """Return a head on scaled features as one on raw features."""
        weight = (head.weight * self.factor).astype(head.weight.dtype)
        bias = head.bias - weight.astype(np.float64) @ self.mean  # of the rounded weights: rounding acts on x - mean
        provenance = {**head.provenance, "blocks": list(widths), "scales": block_scales(widths).tolist()}
        return replace(head, weight=weight, bias=bias.astype(head.bias.dtype), provenance=provenance)


def block_scales(widths: Sequence[int]) -> Float64:
    """Return sqrt(D / (B * width)) for each of B blocks of D features together, float64 (B,)."""
    return np.sqrt(sum(widths) / (len(widths) * np.asarray(widths, dtype=np.float64)))


def fit_blocks(
    X: ArrayLike | Chunked,
    y: ArrayLike,
    X_val: ArrayLike | Chunked | None,
    y_val: ArrayLike | None,
    *,
    widths: Sequence[int],
    standardize: bool = True,
    **options: Any,
) -> Path:
    """Fit as `fit_path` does, on blocks of these widths; a single block is left to `fit_path` itself."""
    classes = options["classes"]
    if len(widths) < 2:
        return fit_path(X, y, X_val, y_val, standardize=standardize, **options)
    features, labels = check_labelled(_in_memory(X), y, len(classes), options.get("task", "single"))
    scale = Scale.of(features, widths, standardize=standardize)
    held_out = None if X_val is None else scale(_in_memory(X_val))
    options["gram"] = None  # would be that of features that are not scaled
    path = fit_path(scale(features), labels, held_out, y_val, standardize=False, **options)
    return replace(path, head=_said(scale.fold(path.head, widths), standardize))


def fit_blocks_once(
    X: ArrayLike | Chunked, y: ArrayLike, *, widths: Sequence[int], standardize: bool = True, **options: Any
) -> LinearHead:
    """Fit as `fit_linear` does, on blocks of these widths."""
    if len(widths) < 2:
        return fit_linear(X, y, standardize=standardize, **options)
    features, labels = check_labelled(_in_memory(X), y, len(options["classes"]), options.get("task", "single"))
    scale = Scale.of(features, widths, standardize=standardize)
    options["gram"] = None
    return _said(scale.fold(fit_linear(scale(features), labels, standardize=False, **options), widths), standardize)


def _in_memory(X: ArrayLike | Chunked) -> ArrayLike:
    if isinstance(X, Chunked):
        raise UsageError(
            "the features of several spaces together do not fit", hint="name one --layer, or more --max-memory"
        )
    return X


def _said(head: LinearHead, standardize: bool) -> LinearHead:
    return replace(head, provenance={**head.provenance, "standardize": standardize})

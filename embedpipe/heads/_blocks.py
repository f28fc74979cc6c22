"""A head on several blocks of features side by side, such as the layers of a backbone.

Each feature is standardised and multiplied by sqrt(D / (B * width of its block)), for B blocks of D features together. All blocks
then contribute the same mean squared norm of a row, so that one of 2,048 features does not dominate one of 64, and the rows have
the norm of D standardised features, so that l2 keeps its meaning. The weights of the head refer to raw features.

>>> path = fit_blocks(X, y, X_val, y_val, widths=(64, 2048), classes=("cat", "dog"))
>>> path.head.predict_proba(X_new)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedpipe.errors import UsageError
from embedpipe.heads._fitting import Path, fit_linear, fit_path
from embedpipe.heads._problem import Chunked, Float32, Float64, map_features
from embedpipe.heads._standardisation import check_labelled, measure
from embedpipe.heads.linear import LinearHead


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
    """Fit a path as `fit_path` does, on blocks of these widths.

    Raises
    ------
    UsageError    the widths do not sum to D, or X does not fit in memory; as `fit_path`
    """
    if len(widths) < 2:
        return fit_path(X, y, X_val, y_val, standardize=standardize, **options)
    scale, fold, labels = _scale_blocks(X, y, widths, standardize, options)
    held_out = None if X_val is None else scale(X_val)
    path = fit_path(scale(X), labels, held_out, y_val, standardize=False, **{**options, "gram": None})
    return replace(path, head=fold(path.head))


def fit_blocks_once(
    X: ArrayLike | Chunked, y: ArrayLike, *, widths: Sequence[int], standardize: bool = True, **options: Any
) -> LinearHead:
    """Fit a head as `fit_linear` does, on blocks of these widths; raises as `fit_blocks` does."""
    if len(widths) < 2:
        return fit_linear(X, y, standardize=standardize, **options)
    scale, fold, labels = _scale_blocks(X, y, widths, standardize, options)
    return fold(fit_linear(scale(X), labels, standardize=False, **{**options, "gram": None}))  # not of scaled features


def _scale_blocks(
    X: ArrayLike | Chunked, y: ArrayLike, widths: Sequence[int], standardize: bool, options: dict[str, Any]
) -> tuple[Callable[[ArrayLike | Chunked], Float32], Callable[[LinearHead], LinearHead], Any]:
    """Measure training features (N, D).

    Returns
    -------
    a function that scales features, one that returns a head on scaled features as one on raw features, and the checked targets
    """
    features, labels = check_labelled(_in_memory(X), y, len(options["classes"]), options.get("task", "single"))
    if sum(widths) != features.shape[1]:
        raise UsageError(f"blocks of {sum(widths)} features together, expected {features.shape[1]}")
    mean, std, scales = np.zeros(sum(widths)), np.ones(sum(widths)), block_scales(widths)
    for end, width in zip(np.cumsum(widths), widths, strict=True) if standardize else ():
        columns = slice(end - width, end)
        mean[columns], std[columns] = measure(features[:, columns])  # separately: the std floor depends on the block
    factor = np.repeat(scales, widths) / std

    def scale(X: ArrayLike | Chunked) -> Any:
        raw = np.asarray(_in_memory(X), dtype=np.float32)
        return map_features(raw, lambda x: ((x - mean) * factor).astype(np.float32), np.inf)

    def fold(head: LinearHead) -> LinearHead:
        weight = (head.weight * factor).astype(head.weight.dtype)
        bias = head.bias - weight.astype(np.float64) @ mean  # with the rounded weights, as in `_standardisation.fold`
        provenance = {**head.provenance, "blocks": list(widths), "scales": scales.tolist(), "standardize": standardize}
        return replace(head, weight=weight, bias=bias.astype(head.bias.dtype), provenance=provenance)

    return scale, fold, labels


def _in_memory(X: ArrayLike | Chunked) -> ArrayLike:
    if isinstance(X, Chunked):
        raise UsageError(
            "the features of several spaces together do not fit in memory",
            hint="name one --layer, or raise --max-memory",
        )
    return X

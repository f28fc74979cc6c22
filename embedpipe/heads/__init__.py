"""Heads: from features (N, D) and labels (N,) to class probabilities, labels or numbers.

All linear heads minimise one objective, mean cross-entropy + l2/2 * ||W||^2 on standardised features with a free bias, by any
of the solvers; `ridge` minimises the squared error. torch and scikit-learn are imported when a solver runs.

>>> path = fit_path(X, y, X_val, y_val, classes=("cat", "dog"))
>>> path.head.save("runs/mine")
>>> load_head("runs/mine").predict_proba(X_new)
"""

from __future__ import annotations

import os
from pathlib import Path as FilePath

from embedpipe.errors import ModelMismatch
from embedpipe.heads._files import read_record
from embedpipe.heads._fitting import L2_GRID, SELECT, SOLVERS, L2Path, fit_linear, fit_path
from embedpipe.heads._problem import ChunkedFeatures, Features, Float64, Fold, Int64, select_rows, stack_rows
from embedpipe.heads._standardisation import block_scale_factors, class_weights
from embedpipe.heads.knn import TEMPERATURE, K, KnnHead, fit_knn, select_knn
from embedpipe.heads.linear import LinearHead


def load_head(folder: str | os.PathLike[str]) -> LinearHead | KnnHead:
    """Read a head of either kind; raises as `LinearHead.load` does."""
    kind = read_record(FilePath(folder)).get("kind")
    if kind == LinearHead.kind:
        return LinearHead.load(folder)
    if kind == KnnHead.kind:
        return KnnHead.load(folder)
    raise ModelMismatch(f"a {kind} head in {folder}, expected linear or knn")

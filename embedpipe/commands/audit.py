"""audit: suspected label errors, outliers and copies, from cached features alone.

Labels are checked against out-of-fold predictions, outliers and copies are found among nearest neighbours.

>>> audit("pets").counts
{'label': 12, 'outlier': 3, 'duplicate': 5}
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import warn
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedpipe.data import Sample
    from embedpipe.features import FeatureSet
    from embedpipe.selection import OutOfFold

    # the sample, another label, the score, the kind, the sample that it copies
    Finding = tuple[Sample, str | None, float, str, Sample | None]

KINDS = ("label", "outlier", "duplicate")
HEADER = ("path", "split", "label", "suggested", "score", "kind", "twin")
MAX_PRODUCTS = 5e12  # multiply-adds of a neighbour search: a minute or two on one core


@dataclass(frozen=True)
class Issue:
    """One image to review.

    suggested : str or None    another label: the predicted one, or that of the copy
    score : float              higher is more suspicious. label: 0.5 to 1; outlier: at least 1; duplicate: cosine to the copy
    kind : str                 "label", "outlier" or "duplicate"
    twin : str or None         path of the image that this one copies
    """

    path: str
    split: str
    label: str
    suggested: str | None
    score: float
    kind: str
    twin: str | None = None


@dataclass(frozen=True)
class Audit:
    """The issues of a data set by kind, the most suspicious first; `csv` is the file that lists them."""

    dataset: str
    n: int
    folds: int
    issues: tuple[Issue, ...]
    csv: Path

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(issue.kind for issue in self.issues)
        return {kind: found[kind] for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        issues = [vars(issue) for issue in self.issues]
        return {**vars(self), "issues": issues, "counts": self.counts, "csv": str(self.csv)}


def audit(
    dataset: FeatureSet | str | None = None,
    *,
    folds: int = 5,
    l2: float | Literal["auto"] = "auto",
    space: str | None = None,
    backbone: str | None = None,
    layer: str | None = None,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    seed: int = 0,
) -> Audit:
    """List suspected label errors, outliers and copies among all labelled images.

    Each image is predicted by a head that was fitted without it. Nothing is changed or removed.

    Parameters
    ----------
    dataset : FeatureSet, or name, id or path of a data set
        Default: the data set that was extracted last.
    folds : int
        Number of folds; each head is fitted on all folds but one.
    l2 : float or auto
        Penalty strength; auto selects it within each fold.
    space : str
        Space to use if the data set has several: folder name or prefix.
    backbone : str
        Use the space of this backbone.
    layer : str
        Use the space of this layer.

    Raises
    ------
    UsageError           no features, no labels, fewer than two classes, or fewer images than folds
    NonFiniteFeatures    NaN or inf in the features
    """
    from embedpipe.cache import Cache
    from embedpipe.data import SPLITS
    from embedpipe.features import FeatureSet, open_features
    from embedpipe.runs import new_run
    from embedpipe.selection import HeadConfig, check_labelled, check_task, predict_out_of_fold

    features = dataset
    if not isinstance(features, FeatureSet):
        features = open_features(Cache(Path(cache_dir)), features, space=space, backbone=backbone, layer=layer)
    check_labelled(features)
    check_task(features, "audit")
    result = predict_out_of_fold(features, HeadConfig(features.classes, l2=l2), folds=folds, splits=SPLITS, seed=seed)
    findings = (*_find_mislabelled(features, result), *_find_outliers_and_copies(features, result.samples))
    name = features.manifest.display_name
    issues = tuple(
        Issue(name(sample), sample.split, sample.label or "", suggested, score, kind, name(twin) if twin else None)
        for sample, suggested, score, kind, twin in findings
    )
    with new_run(Path(runs_dir), "audit") as run:
        found = Audit(features.dataset, len(result.samples), folds, issues, run.final / "audit.csv")
        rows = [{**vars(issue), "score": f"{issue.score:.4f}"}.values() for issue in issues]
        run.write_csv("audit.csv", [HEADER, *rows])
        run.write_json("run.json", {"verb": "audit", "dataset": features.dataset, "report": found.to_dict()})
    return found


def _find_mislabelled(features: FeatureSet, result: OutOfFold) -> Iterator[Finding]:
    from embedpipe.evaluation import find_label_errors

    found = find_label_errors(result.probabilities, result.labels)
    for row, guess, score in zip(*(column.tolist() for column in found), strict=True):
        yield result.samples[row], features.classes[guess], score, "label", None


def _find_outliers_and_copies(features: FeatureSet, samples: tuple[Sample, ...]) -> Iterator[Finding]:
    """Yield outliers, then copies; of identical files the first is searched, the others are copies of it."""
    first: dict[bytes, Sample] = {}
    copies = [(sample, twin, 1.0) for sample in samples if (twin := first.setdefault(sample.key, sample)) is not sample]
    different = tuple(first.values())
    near, far = _search(features, different)
    for row, score in sorted(far.items(), key=lambda pair: -pair[1]):
        yield different[row], None, score, "outlier", None
    copies += [(different[row], different[twin], score) for row, twin, score in sorted(near, key=lambda pair: -pair[2])]
    for sample, twin, score in copies:
        yield sample, twin.label if twin.label != sample.label else None, score, "duplicate", twin


def _search(features: FeatureSet, samples: tuple[Sample, ...]) -> tuple[list[tuple[int, int, float]], dict[int, float]]:
    """Return near copies and outliers among different images; none, with a warning, for too few or too many images."""
    import numpy as np

    from embedpipe.evaluation import MIN_ROWS, copy_ratio, find_neighbours, find_outliers, unit_rows

    n, dim = len(samples), features.feature_dim
    if n < MIN_ROWS or n * n * dim > MAX_PRODUCTS:
        bounds = f"expected {MIN_ROWS} to {int((MAX_PRODUCTS / dim) ** 0.5)}"
        text = f"no search for outliers and near copies among {n} images of {dim} features, {bounds}"
        warn(text)
        return [], {}
    X = features.read(samples)
    X = X - X.mean(axis=0, dtype=np.float64).astype(np.float32)
    unit = unit_rows(X)
    found = find_neighbours(unit, unit, own=np.arange(n))
    return list(found.pairs(copy_ratio(found, n))), find_outliers(X)

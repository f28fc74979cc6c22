"""Classifier: backbone, head, classes and transform as one deployable thing, saved into a run folder and loaded from it.

`fit_head` and `finetune` return one, `predict`, `evaluate` and `finetune` take one. After fit-head the run holds the head
and a reference to the backbone; after finetune it holds all weights, in `model/`.

>>> Classifier.load(Path("runs/20260101-120000-fit-head-0a1b2c")).predict_proba(["a.jpg"])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Cache, KeyIndex
from embedpipe.errors import DecodeError, EmbedpipeError, ModelMismatch, UsageError
from embedpipe.forwarding import Runner, plan_forward, stream_rows
from embedpipe.manifest import Failure
from embedpipe.pipeline import Progress, space_name, space_spec
from embedpipe.places import Place
from embedpipe.provenance import differing_fields, environment
from embedpipe.runs import RunFolder, read_run
from embedpipe.scoring import Scored as Scored
from embedpipe.scoring import report_scores, write_scored

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.features import FeatureSet
    from embedpipe.heads import KnnHead, LinearHead


@dataclass(frozen=True)
class Reference:
    """Where a head's features come from, without the weights themselves.

    spec : dict      all that shapes a row: the space's spec
    loader : dict    keyword arguments of `load_backbone`; `{"name": folder}` for a stored model
    """

    spec: Mapping[str, Any]
    loader: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.spec['source']}:{self.spec['architecture']}"

    def to_dict(self) -> dict[str, Any]:
        return {"spec": dict(self.spec), "loader": dict(self.loader)}

    def load(self, folder: Path | None = None) -> Backbone:
        """Return the backbone that made the features; `folder` is the run that holds a stored model.

        Raises
        ------
        ModelMismatch    it was handed over from Python, or what loads now gives other features
        """
        from embedpipe.backbones import load_backbone

        loader = dict(self.loader)
        if "name" not in loader:
            raise ModelMismatch(
                f"the backbone {self.name} was handed over from Python and cannot be loaded by name",
                hint="extract with a backbone of timm or torchvision, or work with the Classifier in Python",
            )
        if folder is not None and loader["name"] == "model":
            loader["name"] = str(folder / "model")
        backbone = load_backbone(**loader)
        differing = differing_fields(self.spec, space_spec(backbone, self.spec["precision"], self.spec["stored_dtype"]))
        if differing:
            raise ModelMismatch(
                f"{self.name} is not the backbone that made these features: {', '.join(map(str, differing))}",
                hint="extract and fit the head again with the present weights",
                fields=[one.field for one in differing],
            )
        return backbone


@dataclass(frozen=True)
class Probabilities:
    """paths : list of str, values : float64 (N, C), and the images that have none."""

    paths: list[str]
    values: np.ndarray
    failed: tuple[Failure, ...]


@dataclass(frozen=True)
class Classifier:
    """A head and the backbone that its features come from.

    head : LinearHead or KnnHead
    reference : Reference
    report : dict        what fitting it took and scored (the JSON of the verb that made it)
    folder : Path        the run it lies in
    dataset : str        id of the data set that it was fitted on
    """

    head: LinearHead | KnnHead
    reference: Reference
    report: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    dataset: str | None = None
    _backbone: Backbone | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The run's name, for messages."""
        return self.folder.name if self.folder else "this classifier"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.head.classes

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone, loaded when first asked for.

        Raises
        ------
        ModelMismatch    the weights are not those that the head was fitted on
        """
        return self._backbone or self.reference.load(self.folder)

    def predict_proba(self, paths: Sequence[str | os.PathLike[str]]) -> np.ndarray:
        """Return class probabilities float64 (N, C) of image files.

        Raises
        ------
        DecodeError    an image cannot be read; its path and the reason are named
        """
        files = [Path(path) for path in paths]
        result = classify(self, files)
        if result.failed:
            first = result.failed[0]
            raise DecodeError(f"{first.path}: {first.reason}", hint="leave the file out", path=first.path)
        return result.values

    def predict(self, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Return the most probable class of each image file."""
        return [self.classes[k] for k in self.predict_proba(paths).argmax(axis=1)]

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read a classifier from a run folder of fit-head or finetune.

        Raises
        ------
        UsageError       a run of another verb
        ModelMismatch    not a run folder
        """
        from embedpipe.heads import load_head

        record = read_run(folder)
        if "reference" not in record:
            raise UsageError(f"{folder.name} is a run of {record['verb']}", hint="name a run of fit-head or finetune")
        try:
            reference, report, dataset = Reference(**record["reference"]), record["report"], record["dataset"]
        except (KeyError, TypeError) as exc:
            raise ModelMismatch(f"{folder} has a run.json without {exc}", hint="fit the head again") from exc
        return cls(load_head(folder), reference, report, folder, dataset)


def classify(
    classifier: Classifier,
    files: Sequence[Place | Path],
    *,
    cache: Cache | None = None,
    device: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    strict: bool = False,
    progress: Progress | None = None,
) -> Probabilities:
    """Return probabilities of image files, in their order; rows that the cache holds are not computed again.

    Returns
    -------
    Probabilities    of the files that can be read; the others are in `failed`

    Raises
    ------
    EmbedpipeError    strict, and an image failed
    """
    index = KeyIndex()
    keys: dict[Place | Path, bytes] = {}
    failed: dict[Place | Path, tuple[str, str]] = {}
    for file in files:
        try:
            keys[file] = index.key_of(file)
        except OSError as exc:
            failed[file] = ("read", exc.strerror or str(exc))
    index.close()
    rows = _cached_rows(classifier, cache, keys.values())
    unknown = {key: file for file, key in keys.items() if key not in rows}
    if unknown:
        spec = classifier.reference.spec
        forward = plan_forward(
            device=device,
            precision=spec["precision"],
            store_dtype=spec["stored_dtype"],
            batch_size=batch_size,
            workers=workers,
        )
        done = 0
        for batch in stream_rows(unknown.items(), Runner([classifier.backbone], forward.definite)):
            rows |= zip(batch.keys, batch.features, strict=True)
            reasons = {key: (stage, reason) for key, stage, reason in batch.failures}
            failed |= {file: reasons[key] for file, key in keys.items() if key in reasons}
            done += len(batch.keys) + len(batch.failures)
            if progress:
                progress("predict", done, len(unknown))
    if strict and failed:
        file, (_, reason) = next(iter(failed.items()))
        raise EmbedpipeError(f"{file}: {reason}", hint="mend or remove it")
    good = [file for file in files if file not in failed]
    values = np.empty((0, len(classifier.classes)))
    if good:
        X = np.stack([rows[keys[file]] for file in good]).astype(np.float32)
        values = classifier.head.predict_proba(X)
    return Probabilities(
        [str(file) for file in good], values, tuple(Failure(str(file), *reason) for file, reason in failed.items())
    )


def _cached_rows(classifier: Classifier, cache: Cache | None, keys: Any) -> dict[bytes, np.ndarray]:
    """Return the rows that the classifier's own space holds, by key."""
    if cache is None:
        return {}
    spec = dict(classifier.reference.spec)
    space = cache.open_space(spec, name=space_name(spec))
    space.mark_used()
    view = space.view()
    known = list(dict.fromkeys(key for key in keys if key in view))
    return dict(zip(known, view.read(known), strict=True)) if known else {}


def save_run(
    run: RunFolder,
    verb: str,
    classifier: Classifier,
    features: FeatureSet,
    scored: Mapping[str, Scored],
    report: Mapping[str, Any],
    *,
    seconds: float,
) -> Classifier:
    """Score what was predicted for each split, write the run's files, and return the classifier as it lies in the run.

    Parameters
    ----------
    scored : mapping of str to Scored    by split
    report : mapping                     the JSON of the verb, without `run`, `folder`, `seconds` and the scores
    """
    classes, applied = classifier.classes, classifier.head.provenance.get("temperature")
    report = {
        **report,
        "run": run.final.name,
        "folder": str(run.final),
        **report_scores(scored, classes, applied=applied, unseen_val=not report.get("refit")),
        "seconds": round(seconds, 3),
    }
    classifier.head.save(run.folder)
    run.write_json("metrics.json", report["metrics"])
    write_scored(run, scored, classes, features.manifest)
    run.write_json(
        "run.json",
        {
            "verb": verb,
            "dataset": features.dataset,
            "reference": classifier.reference.to_dict(),
            "report": report,
            "environment": environment(),
        },
    )
    return replace(classifier, report=report, folder=run.final, dataset=features.dataset)

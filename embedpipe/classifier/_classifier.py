"""Classifier: backbone, head, classes and transform as one deployable thing, saved into a run folder and loaded from it.

`fit_head` and `finetune` return one, `predict`, `evaluate` and `finetune` take one. After fit-head the run holds the head
and a reference to the backbone; after finetune it holds all weights, in `model/`.

>>> Classifier.load(Path("runs/20260101-120000-fit-head-0a1b2c")).predict_proba(["a.jpg"])
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Cache, KeyIndex, Space
from embedpipe.classifier._scoring import Scored as Scored
from embedpipe.classifier._scoring import answer, report_scores, write_scored
from embedpipe.data import Failure, Place
from embedpipe.errors import DecodeError, EmbedpipeError, ModelMismatch, UsageError
from embedpipe.features import PENULTIMATE, loader_of
from embedpipe.inference import Progress, Rows, Runner, plan_forward, space_name, space_spec, stream_rows
from embedpipe.provenance import differing_fields, environment
from embedpipe.runs import RunFolder, find_run, read_run
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.features import FeatureSet
    from embedpipe.heads import KnnHead, LinearHead

TAPPED = ("layer", "pool")  # what of a spec is where the features are taken, not which model they come from


@dataclass(frozen=True)
class Reference:
    """Where a head's features come from, without the weights themselves.

    spec : dict      all that shapes a row: the space's spec
    loader : dict    keyword arguments of `load_backbone`; `{"name": folder}` for a stored model
    beside : tuple of Reference    further spaces, whose rows stand to the right of this one's
    """

    spec: Mapping[str, Any]
    loader: Mapping[str, Any]
    beside: tuple[Reference, ...] = ()

    @classmethod
    def of(cls, spaces: Sequence[Space]) -> Reference:
        """Return the reference to the rows of spaces, side by side."""
        first, *others = (cls(space.spec, space.loader) for space in spaces)
        return replace(first, beside=tuple(others))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Reference:
        """Return what `to_dict` told.

        Raises
        ------
        KeyError, TypeError    a field is missing, unknown or of another kind
        """
        beside = tuple(cls(one["spec"], one["loader"]) for one in fields.get("beside", ()))
        return cls(**{**fields, "beside": beside})

    @property
    def name(self) -> str:
        return f"{self.spec['source']}:{self.spec['architecture']}"

    @property
    def parts(self) -> tuple[Reference, ...]:
        """One reference a space, in the order of the columns."""
        return (replace(self, beside=()), *self.beside)

    def to_dict(self) -> dict[str, Any]:
        beside = {"beside": [one.to_dict() for one in self.beside]} if self.beside else {}
        return {"spec": dict(self.spec), "loader": dict(self.loader), **beside}

    def load(self, folder: Path | None = None) -> Backbone:
        """Return the backbone that made the features; `folder` is the run that holds a stored model.

        Raises
        ------
        ModelMismatch    it was handed over from Python, or what loads now gives other features
        """
        from embedpipe.backbones import load_backbone

        loader = loader_of(self.spec, self.loader)
        if "name" not in loader:
            raise ModelMismatch(
                f"the backbone {self.name} was handed over from Python and cannot be loaded by name",
                hint="extract with a backbone of timm or torchvision, or work with the Classifier in Python",
            )
        if folder is not None and loader["name"] == "model":
            loader["name"] = str(folder / "model")
        return self._proved(load_backbone(**loader))

    def is_of(self, backbone: Backbone) -> bool:
        """Whether the features are those of this very model, at whatever layer."""
        return all(self.spec.get(name) == value for name, value in backbone.spec.items() if name not in TAPPED)

    def taken_from(self, backbone: Backbone) -> Backbone:
        """Return a backbone of the same model at the layer of these features; the two share the model."""
        from embedpipe.backbones import at_layer

        if all(self.spec[name] == backbone.spec[name] for name in TAPPED):
            return backbone
        layer = None if self.spec["layer"] == PENULTIMATE else self.spec["layer"]
        pool = self.loader.get("pool", self.spec["pool"] if layer else "auto")
        return self._proved(at_layer(backbone, layer, pool=pool))

    def _proved(self, backbone: Backbone) -> Backbone:
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

    @property
    def task(self) -> str:
        """Single, multilabel or regression."""
        return self.head.task

    @property
    def backbone(self) -> Backbone:
        """The backbone (of the first space, where there are several), loaded when first asked for.

        Raises
        ------
        ModelMismatch    the weights are not those that the head was fitted on
        """
        return self.backbones[0]

    @cached_property
    def backbones(self) -> tuple[Backbone, ...]:
        """One a space; those of one model share it, so that an image passes it once."""
        loaded = [self._backbone] if self._backbone else []
        found = []
        for part in self.reference.parts:
            model = next((one for one in loaded if part.is_of(one)), None)
            found.append(part.taken_from(model) if model else part.load(self.folder))
            loaded.append(found[-1])
        return tuple(found)

    def predict_proba(self, paths: Sequence[PathLike]) -> np.ndarray:
        """Return probabilities float64 (N, C) of image files, or numbers (N, 1), as the head gives them.

        Raises
        ------
        DecodeError    an image cannot be read; its path and the reason are named
        UsageError     a path, and no list of paths
        """
        if isinstance(paths, str | os.PathLike):
            raise UsageError(f"found {str(paths)!r}, expected a list of paths", hint="put it into brackets")
        files = [Path(path) for path in paths]
        result = classify(self, files)
        if result.failed:
            first = result.failed[0]
            raise DecodeError(f"{first.path}: {first.reason}", hint="leave the file out", path=first.path)
        return result.values

    def predict(self, paths: Sequence[PathLike]) -> list[str]:
        """Return what the head says of each image file: the most probable class; labels joined by "|"; the number as text."""
        return [answer(row, self.classes, self.task)[0] for row in self.predict_proba(paths)]

    @classmethod
    def of(cls, run: Classifier | PathLike, runs_dir: PathLike) -> Classifier:
        """Return a classifier as it is, and that in a run by the run's id, a prefix of it, or its folder; see `load`."""
        return run if isinstance(run, Classifier) else cls.load(find_run(Path(runs_dir), run))

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
            reference, report, dataset = Reference.from_dict(record["reference"]), record["report"], record["dataset"]
        except (KeyError, TypeError, AttributeError) as exc:
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
    keys: dict[Place | Path, bytes] = {}
    failed: dict[Place | Path, tuple[str, str]] = {}
    with closing(KeyIndex()) as index:
        for file in files:
            try:
                keys[file] = index.key_of(file)
            except OSError as exc:
                failed[file] = ("read", exc.strerror or str(exc))
    rows = [_cached_rows(part, cache, keys.values()) for part in classifier.reference.parts]
    unknown = {key: file for file, key in keys.items() if any(key not in one for one in rows)}
    machine = {"device": device, "batch_size": batch_size, "workers": workers}
    done: set[bytes] = set()
    for number, batch in _computed_rows(classifier, unknown, rows, **machine):
        rows[number] |= zip(batch.keys, batch.features, strict=True)
        reasons = {key: (stage, reason) for key, stage, reason in batch.failures}
        failed |= {file: reasons[key] for file, key in keys.items() if key in reasons}
        done |= {*batch.keys, *reasons}
        if progress:
            progress("predict", len(done), len(unknown))
    if strict and failed:
        file, (_, reason) = next(iter(failed.items()))
        raise EmbedpipeError(f"{file}: {reason}", hint="mend or remove it")
    good = [file for file in files if file not in failed]
    values = np.empty((0, len(classifier.classes)))
    if good:
        blocks = [np.stack([one[keys[file]] for file in good]).astype(np.float32) for one in rows]
        values = classifier.head.predict_proba(np.hstack(blocks))
    return Probabilities(
        [str(file) for file in good], values, tuple(Failure(str(file), *reason) for file, reason in failed.items())
    )


def _cached_rows(reference: Reference, cache: Cache | None, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
    """Return the rows that the space of a reference holds, by key."""
    if cache is None:
        return {}
    spec = dict(reference.spec)
    space = cache.open_space(spec, name=space_name(spec))
    space.mark_used()
    view = space.view()
    known = list(dict.fromkeys(key for key in keys if key in view))
    return dict(zip(known, view.read(known), strict=True)) if known else {}


def _computed_rows(
    classifier: Classifier,
    unknown: Mapping[bytes, Place | Path],
    rows: Sequence[Mapping[bytes, np.ndarray]],
    **machine: Any,
) -> Iterator[tuple[int, Rows]]:
    """Yield the number of a space and rows that it lacks; spaces that lack the same images share decode and model."""
    passes: dict[tuple[Any, ...], dict[bytes, Place | Path]] = defaultdict(dict)
    for key, file in unknown.items():
        lacking: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, part in enumerate(classifier.reference.parts):
            if key not in rows[number]:
                lacking[part.spec["precision"], part.spec["stored_dtype"]].append(number)
        for (precision, dtype), numbers in lacking.items():
            passes[precision, dtype, *numbers][key] = file
    for (precision, dtype, *numbers), items in passes.items():
        forward = plan_forward(precision=precision, store_dtype=dtype, **machine)
        runner = Runner([classifier.backbones[n] for n in numbers], forward.definite)
        for batch in stream_rows(items.items(), runner):
            yield numbers[batch.backbone], batch


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

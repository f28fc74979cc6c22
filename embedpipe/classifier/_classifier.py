"""Classifier: backbone, head, classes and transform as one deployable object, saved in a run folder and loaded from it.

`fit_head` and `finetune` return a classifier; `predict`, `evaluate` and `finetune` take one. After fit-head the run holds
the head and a reference to the backbone; after finetune it also holds all weights, in `model/`.

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
from embedpipe.classifier._scoring import Scored, answer, report_scores, write_scored
from embedpipe.data import ByteSource, Failure
from embedpipe.errors import DecodeError, EmbedpipeError, ModelMismatch, UsageError
from embedpipe.features import LAYER_FIELDS, PENULTIMATE, loader_of, model_fields
from embedpipe.inference import Progress, Rows, Runner, resolve_settings, space_spec, stream_rows
from embedpipe.provenance import differing_fields, environment
from embedpipe.runs import RunFolder, find_run, read_run
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.features import FeatureSet
    from embedpipe.heads import KnnHead, LinearHead


@dataclass(frozen=True)
class Reference:
    """Where the features of a head come from, without the weights themselves.

    Parameters
    ----------
    spec : dict      the spec of the space: all that shapes a row
    loader : dict    keyword arguments of `load_backbone`; `{"name": folder}` for a saved model
    extra : tuple of Reference    further spaces, whose columns follow those of this one
    """

    spec: Mapping[str, Any]
    loader: Mapping[str, Any]
    extra: tuple[Reference, ...] = ()

    @classmethod
    def of(cls, spaces: Sequence[Space]) -> Reference:
        """Return the reference to several spaces, whose columns are concatenated."""
        first, *others = (cls(space.spec, space.loader) for space in spaces)
        return replace(first, extra=tuple(others))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Reference:
        """Return the reference that `to_dict` described.

        Raises
        ------
        KeyError, TypeError    a field is missing, unknown or of another type
        """
        own = {name: value for name, value in fields.items() if name != "beside"}
        return cls(**own, extra=tuple(cls(part["spec"], part["loader"]) for part in fields.get("beside", ())))

    @property
    def name(self) -> str:
        return f"{self.spec['source']}:{self.spec['architecture']}"

    @property
    def parts(self) -> tuple[Reference, ...]:
        """One reference per space, in the order of the columns."""
        return (replace(self, extra=()), *self.extra)

    def to_dict(self) -> dict[str, Any]:
        extra = {"beside": [part.to_dict() for part in self.extra]} if self.extra else {}
        return {"spec": dict(self.spec), "loader": dict(self.loader), **extra}

    def space(self, cache: Cache) -> Space:
        """Return the space of the features in a cache, whether or not it exists there."""
        return cache.open_space(self.spec)

    def load(self, folder: Path | None = None) -> Backbone:
        """Return the backbone that computed the features; `folder` is the run that holds a saved model.

        Raises
        ------
        ModelMismatch    it was passed from Python, or the backbone that loads now computes other features
        """
        from embedpipe.backbones import load_backbone

        loader = loader_of(self.spec, self.loader)
        if "name" not in loader:
            raise ModelMismatch(
                f"the backbone {self.name} was passed from Python and cannot be loaded by name",
                hint="extract with a backbone of timm or torchvision, or use the Classifier in Python",
            )
        if folder is not None and loader["name"] == "model":
            loader["name"] = str(folder / "model")
        return self._checked(load_backbone(**loader))

    def is_of(self, backbone: Backbone) -> bool:
        """Return True if the features come from this model, at any layer."""
        return model_fields(backbone.spec).items() <= self.spec.items()

    def taken_from(self, backbone: Backbone) -> Backbone:
        """Return the backbone of the same model at the layer of these features; the two share the model."""
        from embedpipe.backbones import at_layer

        if all(self.spec[name] == backbone.spec[name] for name in LAYER_FIELDS):
            return backbone
        layer = None if self.spec["layer"] == PENULTIMATE else self.spec["layer"]
        pool = self.loader.get("pool", self.spec["pool"] if layer else "auto")
        return self._checked(at_layer(backbone, layer, pool=pool))

    def _checked(self, backbone: Backbone) -> Backbone:
        differing = differing_fields(self.spec, space_spec(backbone, self.spec["precision"], self.spec["stored_dtype"]))
        if differing:
            message = f"{self.name} is not the backbone that computed these features: {', '.join(map(str, differing))}"
            raise ModelMismatch(message, hint="extract and fit the head again with the present weights")
        return backbone


@dataclass(frozen=True)
class Classifier:
    """A head and the backbone that its features come from.

    Parameters
    ----------
    head : LinearHead or KnnHead
    reference : Reference
    report : dict        the JSON of the command that fitted it
    folder : Path        the run that holds it
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
        """The name of the run, for messages."""
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
        """The backbone (of the first space if there are several), loaded on first access.

        Raises
        ------
        ModelMismatch    the weights are not those that the head was fitted on
        """
        return self.backbones[0]

    @cached_property
    def backbones(self) -> tuple[Backbone, ...]:
        """One per space; those of the same model share it, so that an image passes through it once."""
        loaded = [self._backbone] if self._backbone else []
        backbones = []
        for part in self.reference.parts:
            model = next((backbone for backbone in loaded if part.is_of(backbone)), None)
            backbones.append(part.taken_from(model) if model else part.load(self.folder))
            loaded.append(backbones[-1])
        return tuple(backbones)

    @property
    def augmentation(self) -> tuple[str, int]:
        """Name and seed of the augmentation that the run was trained with, or else those that `extract` uses by default."""
        made = self.report.get("views") or self.report.get("options") or {}
        return (made["augment"], made["seed"]) if made.get("augment", "none") != "none" else ("standard", 0)

    def backbone_at(self, number: int) -> Backbone:
        """Return the backbone of a block of features: those of the image, then those of view 1, 2, ..."""
        view, part = divmod(number, len(self.backbones))
        augment, seed = self.augmentation
        return self.backbones[part].augmented(augment, seed=seed, view=view) if view else self.backbones[part]

    def predict_proba(self, paths: Sequence[PathLike]) -> np.ndarray:
        """Return the probabilities float64 (N, C) of image files, or the predicted numbers (N, 1) of a regression.

        Raises
        ------
        DecodeError    an image cannot be read; the message gives its path and the reason
        UsageError     `paths` is a single path instead of a list
        """
        if isinstance(paths, str | os.PathLike):
            raise UsageError(f"got the path {str(paths)!r}, expected a list of paths", hint="put it into brackets")
        _, probabilities, failed = classify(self, [Path(path) for path in paths])
        if failed:
            raise DecodeError(f"{failed[0].path}: {failed[0].reason}", hint="leave the file out", path=failed[0].path)
        return probabilities

    def predict(self, paths: Sequence[PathLike]) -> list[str]:
        """Return the prediction for each image file: the most probable class; labels joined by "|"; the number as text."""
        return [answer(row, self.classes, self.task)[0] for row in self.predict_proba(paths)]

    @classmethod
    def of(cls, run: Classifier | PathLike, runs_dir: PathLike) -> Classifier:
        """Return a classifier unchanged, or load that of a run from its id, a prefix of the id, or its folder; see `load`."""
        return run if isinstance(run, Classifier) else cls.load(find_run(Path(runs_dir), run))

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read a classifier from a run folder of fit-head or finetune.

        Raises
        ------
        UsageError       a run of another command
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
    files: Sequence[ByteSource | Path],
    *,
    cache: Cache | None = None,
    device: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    strict: bool = False,
    progress: Progress | None = None,
    views: int = 0,
) -> tuple[list[str], np.ndarray, tuple[Failure, ...]]:
    """Return the probabilities of image files, in their order; rows in the cache are not computed again.

    views : int    augmented views of each image, whose probabilities are averaged with those of the image

    Returns
    -------
    paths : list of str                n files that can be read
    probabilities : float64 (n, C)     of these files
    failed : tuple of Failure          the other files

    Raises
    ------
    EmbedpipeError    `strict`, and an image failed
    """
    keys: dict[ByteSource | Path, bytes] = {}
    failed: dict[ByteSource | Path, Failure] = {}
    with closing(KeyIndex()) as index:
        for file in files:
            try:
                keys[file] = index.key_of(file)
            except OSError as exc:
                failed[file] = Failure(str(file), "read", exc.strerror or str(exc))
    cached = [_cached_rows(part, cache, keys.values()) for part in classifier.reference.parts]
    rows: list[dict[bytes, np.ndarray]] = [*cached, *({} for _ in range(views * len(cached)))]
    unknown = {key: file for file, key in keys.items() if any(key not in one for one in rows)}
    machine = {"device": device, "batch_size": batch_size, "workers": workers}
    done: set[bytes] = set()
    for number, batch in _computed_rows(classifier, unknown, rows, **machine):
        rows[number] |= zip(batch.keys, batch.features, strict=True)
        reasons = {key: (stage, reason) for key, stage, reason in batch.failures}
        failed |= {file: Failure(str(file), *reasons[key]) for file, key in keys.items() if key in reasons}
        done |= {*batch.keys, *reasons}
        if progress:
            progress("predict", len(done), len(unknown))
    if strict and failed:
        first = next(iter(failed.values()))
        raise EmbedpipeError(f"{first.path}: {first.reason}", hint="repair or remove it")
    good = [file for file in files if file not in failed]
    probabilities = np.empty((0, len(classifier.classes)))
    if good:
        blocks = [np.stack([one[keys[file]] for file in good]).astype(np.float32) for one in rows]
        each = [np.hstack(blocks[first : first + len(cached)]) for first in range(0, len(blocks), len(cached))]
        probabilities = np.mean([classifier.head.predict_proba(one) for one in each], axis=0)
    return [str(file) for file in good], probabilities, tuple(failed.values())


def _cached_rows(reference: Reference, cache: Cache | None, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
    """Return the rows in the space of a reference, by key."""
    if cache is None:
        return {}
    space = reference.space(cache)
    space.mark_used()
    view = space.view()
    known = list(dict.fromkeys(key for key in keys if key in view))
    return dict(zip(known, view.read(known), strict=True)) if known else {}


def _computed_rows(
    classifier: Classifier,
    unknown: Mapping[bytes, ByteSource | Path],
    rows: Sequence[Mapping[bytes, np.ndarray]],
    **machine: Any,
) -> Iterator[tuple[int, Rows]]:
    """Yield an index into `rows` and computed rows that are lacking there; those that lack the same images share one pass."""
    passes: dict[tuple[Any, ...], dict[bytes, ByteSource | Path]] = defaultdict(dict)
    for key, file in unknown.items():
        lacking: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, of_key in enumerate(rows):
            if key not in of_key:
                part = classifier.reference.parts[number % len(classifier.reference.parts)]
                lacking[part.spec["precision"], part.spec["stored_dtype"]].append(number)
        for arithmetic, numbers in lacking.items():
            passes[*arithmetic, *numbers][key] = file
    for (precision, dtype, *numbers), items in passes.items():
        forward = resolve_settings(precision=precision, store_dtype=dtype, **machine)
        runner = Runner([classifier.backbone_at(n) for n in numbers], forward.definite)
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
    """Score the predictions of each split, write the files of the run, and return the classifier of the run.

    Parameters
    ----------
    scored : mapping of str to Scored    by split
    report : mapping                     the JSON of the command, without `run`, `folder`, `seconds` and the scores
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
    record = {"verb": verb, "dataset": features.dataset, "reference": classifier.reference.to_dict(), "report": report}
    run.write_json("run.json", record | {"environment": environment()})
    return replace(classifier, report=report, folder=run.final, dataset=features.dataset)

"""evaluate: metrics with intervals on labelled images.

>>> evaluate("20260101-120000-fit-head-0a1b2c", "holdout/").metrics["accuracy_ci95"]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, UsageError, warn
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier
    from embedpipe.data import Failure, Manifest, Sample
    from embedpipe.inference import Progress

MAX_NAMED = 8  # classes in a message


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one classifier on labelled images.

    metrics : dict                 as returned by `Scored.metrics`
    confusion : int64 (C, C)       rows are true classes, columns predicted ones; None unless the task is single labels
    failed : tuple of Failure      images without a prediction
    chosen_on : str or None        the split, if it was used to select the head
    """

    run: str
    split: str
    metrics: dict[str, Any]
    confusion: np.ndarray | None
    classes: tuple[str, ...]
    failed: tuple[Failure, ...]
    chosen_on: str | None = None
    task: str = "single"

    def to_dict(self) -> dict[str, Any]:
        confusion = None if self.confusion is None else self.confusion.tolist()
        failed = [vars(failure) for failure in self.failed]
        return {**vars(self), "classes": list(self.classes), "confusion": confusion, "failed": failed}

    def confusion_csv(self) -> str:
        """Return the confusion matrix as CSV: a header of predicted classes, then one row per true class.

        Raises
        ------
        UsageError    the task is not single labels
        """
        from embedpipe.classifier import confusion_csv

        if self.confusion is None:
            raise UsageError(f"{self.task} targets have no confusion matrix", hint="leave out --confusion")
        return confusion_csv(self.classes, self.confusion)


def evaluate(
    run: Classifier | PathLike,
    data: PathLike | Sequence[PathLike] | None = None,
    *,
    split: Literal["auto", "train", "val", "test", "all"] = "auto",
    confusion: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
    workers: int | Literal["auto"] = "auto",
    strict: bool = False,
    allow_outside: bool = False,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    progress: Progress | None = None,
) -> Evaluation:
    """Score a classifier on labelled images.

    Parameters
    ----------
    run : Classifier, or id, prefix or folder of a run
    data : path or several
        Class folders or a manifest with labels. Default: the data set that the run was fitted on.
    split : str
        Split to score; auto means test of the run's own data, and all images of other data.
    confusion : str
        Write the confusion matrix to this CSV file; single labels only.
    batch_size : int or auto
        Images per forward pass.
    device : str
        auto, cpu, cuda, cuda:K or mps.
    workers : int or auto
        Decoder processes.
    strict : bool
        Exit with 1 instead of 3 if an image failed.
    allow_outside : bool
        Allow a manifest to name files outside its own folder.

    Raises
    ------
    UsageError    no labels, a label or a task that the head does not support, or no sample in the split
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, Scored, classify, confusion_of
    from embedpipe.storage import write_atomic

    run = Classifier.of(run, runs_dir)
    cache = Cache(Path(cache_dir))
    manifest = _manifest(run, data, cache, allow_outside)
    if split == "auto":
        split = "test" if data is None else "all"
    samples = [s for s in manifest.samples if s.label is not None and split in ("all", s.split)]
    _check(manifest, run, [s.label or "" for s in samples], split)
    files = {manifest.byte_source_of(s): s for s in samples}
    machine: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers, "progress": progress}
    paths, probabilities, unread = classify(run, list(files), cache=cache, strict=strict, **machine)
    by_path = {str(file): sample for file, sample in files.items()}
    scored = Scored(tuple(by_path[path] for path in paths), probabilities, run.task)
    matrix = confusion_of(scored, run.classes) if run.task == "single" else None
    scores, failed = scored.metrics(run.classes), (*manifest.unreadable, *unread)
    chosen_on = split if data is None and split == run.report.get("chosen_on") else None
    if data is not None:
        _warn_about_training_images(run, cache, scored.samples)
    evaluation = Evaluation(run.name, split, scores, matrix, run.classes, failed, chosen_on, run.task)
    if confusion:
        write_atomic(Path(confusion), evaluation.confusion_csv().encode("utf-8", "surrogateescape"))
    return evaluation


def _manifest(
    run: Classifier, data: PathLike | Sequence[PathLike] | None, cache: Cache, allow_outside: bool
) -> Manifest:
    from embedpipe.cache import KeyIndex
    from embedpipe.data import read_manifest

    if data is None:
        return cache.read_dataset(run.dataset)
    with closing(KeyIndex()) as index:
        return read_manifest(data, key_of=index.key_of, allow_outside=allow_outside)


def _warn_about_training_images(run: Classifier, cache: Cache, samples: Sequence[Sample]) -> None:
    """Warn if images were in the train or val split of the run, as far as the cache still has its data set."""
    used: set[bytes] = set()
    with suppress(EmbedpipeError):
        used = {one.key for one in cache.read_dataset(run.dataset).samples if one.split in ("train", "val")}
    known = [one for one in samples if one.key in used]
    if known:
        warn(
            f"{len(known)} of {len(samples)} images are in train or val of {run.name} (first: {known[0].path}): "
            "the metrics do not estimate its performance on new images"
        )


def _check(manifest: Manifest, run: Classifier, labels: list[str], split: str) -> None:
    from embedpipe.data import label_names

    if not labels:
        hint = f"found {', '.join(manifest.splits) or 'no split'}; name one with --split, or give labelled DATA"
        raise UsageError(f"{manifest.name} has no labelled images in the split {split}", hint=hint)
    if manifest.task != run.task:
        message = f"{manifest.name} has {manifest.task} targets, but {run.name} was fitted on {run.task} targets"
        raise UsageError(message, hint="evaluate on data with the label column that the head was fitted on")
    unknown = sorted({name for label in labels for name in label_names(label, run.task)} - set(run.classes))
    if unknown:
        message = f"{manifest.name} has the class {unknown[0]!r}, expected {_list_classes(run.classes)}"
        raise UsageError(message, hint="evaluate on images of these classes")


def _list_classes(classes: Sequence[str]) -> str:
    """Return the first class names and the number of the others."""
    more = len(classes) - MAX_NAMED
    return ", ".join(classes[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")

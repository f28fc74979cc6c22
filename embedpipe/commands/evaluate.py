"""evaluate: scores with intervals on labelled images.

>>> evaluate("20260101-120000-fit-head-0a1b2c", "holdout/").metrics["accuracy_ci95"]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    import numpy as np

    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier
    from embedpipe.data import Failure, Manifest, Sample
    from embedpipe.inference import Progress

SHOWN = 8  # classes that a message names


@dataclass(frozen=True)
class Evaluation:
    """Scores of one classifier on labelled images.

    metrics : dict                 as `Scored.metrics` gives them: accuracy with its 95 % interval, and so on
    confusion : int64 (C, C)       rows are true classes, columns predicted ones; None but for single labels
    classes : tuple of str
    failed : images left out
    chosen_on : str or None        the split, where it helped to choose the head; None for one that did not
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
        return {
            "run": self.run,
            "split": self.split,
            "metrics": self.metrics,
            "task": self.task,
            "classes": list(self.classes),
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "failed": [vars(failure) for failure in self.failed],
            "chosen_on": self.chosen_on,
        }

    def confusion_csv(self) -> str:
        """Return the confusion matrix as CSV: a header of predicted classes, then a row a true class.

        Raises
        ------
        UsageError    there is none
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
        Which split to score; auto is test on the run's own data, and all images of other data.
    confusion : str
        Write the confusion matrix to this CSV file; single labels only.
    batch_size : int or auto
        Images a forward pass.
    device : str
        auto, cpu, cuda, cuda:K or mps.
    workers : int or auto
        Decoding threads.
    strict : bool
        Exit with 1, not 3, when an image failed.
    allow_outside : bool
        Let a manifest name files outside its own folder.

    Raises
    ------
    UsageError    no labels, a label or a task that the head does not know, or no sample in the split
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Classifier, Scored, classify, confusion_of
    from embedpipe.storage import publish

    run = Classifier.of(run, runs_dir)
    cache = Cache(Path(cache_dir))
    manifest = _manifest(run, data, cache, allow_outside)
    if split == "auto":
        split = "test" if data is None else "all"
    samples = [s for s in manifest.samples if s.label is not None and split in ("all", s.split)]
    _check(manifest, run, [s.label or "" for s in samples], split)
    files = {str(manifest.place_of(s)): s for s in samples}
    machine: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers, "progress": progress}
    result = classify(
        run, list(dict.fromkeys(manifest.place_of(s) for s in samples)), cache=cache, strict=strict, **machine
    )
    scored = Scored(tuple(files[path] for path in result.paths), result.values, run.task)
    matrix = confusion_of(scored, run.classes) if run.task == "single" else None
    scores, failed = scored.metrics(run.classes), (*manifest.unreadable, *result.failed)
    chosen_on = run.report.get("chosen_on") if data is None else None
    seen = chosen_on if chosen_on == split else None
    if data is not None:
        _warn_of_known(run, cache, scored.samples)
    done = Evaluation(run.name, split, scores, matrix, run.classes, failed, seen, run.task)
    if confusion:
        publish(Path(confusion), done.confusion_csv().encode("utf-8", "surrogateescape"))
    return done


def _manifest(
    run: Classifier, data: PathLike | Sequence[PathLike] | None, cache: Cache, allow_outside: bool
) -> Manifest:
    from embedpipe.cache import KeyIndex
    from embedpipe.data import read_manifest

    if data is None:
        return cache.read_dataset(run.dataset)
    with closing(KeyIndex()) as index:
        return read_manifest(data, key_of=index.key_of, allow_outside=allow_outside)


def _warn_of_known(run: Classifier, cache: Cache, samples: Sequence[Sample]) -> None:
    """Warn of images that the head was fitted or chosen on, where the cache still knows which these were."""
    used: set[bytes] = set()
    with suppress(EmbedpipeError):
        used = {one.key for one in cache.read_dataset(run.dataset).samples if one.split in ("train", "val")}
    known = [one for one in samples if one.key in used]
    if known:
        warnings.warn(
            f"{len(known)} of {len(samples)} images are in train or val of {run.name} (first: {known[0].path}): "
            "the scores are no estimate of what it does on new images",
            EmbedpipeWarning,
            stacklevel=3,
        )


def _check(manifest: Manifest, run: Classifier, labels: list[str], split: str) -> None:
    from embedpipe.data import names_of

    if not labels:
        raise UsageError(
            f"{manifest.name} has no labelled image in the split {split}",
            hint=f"found {', '.join(manifest.splits) or 'no split'}; name one with --split, or give labelled DATA",
        )
    if manifest.task != run.task:
        raise UsageError(
            f"{manifest.name} has {manifest.task} targets, and {run.name} was fitted on {run.task} ones",
            hint="evaluate on data with the column that the head was fitted on",
        )
    strange = sorted({name for label in labels for name in names_of(label, run.task)} - set(run.classes))
    if strange:
        raise UsageError(
            f"{manifest.name} has the class {strange[0]!r}, expected {_shown(run.classes)}",
            hint="evaluate on images of the classes that the head knows",
        )


def _shown(classes: Sequence[str]) -> str:
    """Return the first classes, and how many there are beside."""
    more = len(classes) - SHOWN
    return ", ".join(classes[:SHOWN]) + (f" and {more} more" if more > 0 else "")

"""embedpipe fit-head [DATASET]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich_click as click

from embedpipe import fitting
from embedpipe.cli._build import Session, command, scores


@command(fitting.fit_head, example="embedpipe fit-head --shots 1,5,10 --folds 5")
@click.argument("dataset", required=False)
def fit_head(session: Session, dataset: str | None, **options: Any) -> None:
    report = fitting.fit_head(dataset, **options).report
    chosen = "" if report["l2"] is None else f", l2 {report['l2']:.3g}"
    title = f"run {report['run']}: {report['solver']}{chosen}, {report['n_train']} training images, {report['seconds']:.1f} s"
    parts = [title, scores(report["metrics"])]
    parts += [tell_curve(report["curve"])] if "curve" in report else []
    parts += [tell_folds(report["folds"])] if "folds" in report else []
    session.finish(report, "\n".join(parts))


def tell_curve(curve: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of mean accuracies, a row a size, a column a split."""
    splits = list(curve[0]["metrics"])
    lines = [f"\n{'shots':<6} {'n':>6} {'repeats':>7}" + "".join(f"  {split:<24}" for split in splits)]
    for point in curve:
        cells = "".join(f"  {_mean(point['metrics'][split]):<24}" for split in splits)
        lines.append(f"{point['shots']:<6} {point['n_train']:>6} {point['repeats']:>7}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def _mean(one: Mapping[str, Any]) -> str:
    interval = one["accuracy_ci95"]
    return f"{one['accuracy']:.4f}" + (f" ({interval[0]:.4f} - {interval[1]:.4f})" if interval else "")


def tell_folds(folds: Mapping[str, Any]) -> str:
    each = ", ".join(f"{fold['accuracy']:.4f}" for fold in folds["per_fold"])
    return f"\n{folds['k']} folds over train and val, {folds['n']} images: accuracy {_mean(folds)}; each {each}"

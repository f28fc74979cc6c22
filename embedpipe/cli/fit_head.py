"""embedpipe fit-head [DATASET]"""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe import fitting
from embedpipe.cli._build import Session, command, scores, worst


@command(fitting.fit_head, example="embedpipe fit-head --l2 auto")
@click.argument("dataset", required=False)
def fit_head(session: Session, dataset: str | None, **options: Any) -> None:
    report = fitting.fit_head(dataset, **options).report
    chosen = "" if report["l2"] is None else f", l2 {report['l2']:.3g}"
    title = f"run {report['run']}: {report['solver']}{chosen}, {report['n_train']} training images, {report['seconds']:.1f} s"
    calibrated = " calibrated" if (report["calibration"] or {}).get("applied") else ""
    table = scores(report["metrics"], report["chosen_on"])
    session.finish(report, f"{title}{calibrated}\n{table}\n{worst(report['worst_classes'])}".rstrip())

"""embedpipe evaluate RUN [DATA]"""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command, format_scores
from embedpipe.commands import evaluate as evaluation


@command(evaluation.evaluate, example="embedpipe evaluate RUN holdout/ --confusion confusion.csv")
@click.argument("run")
@click.argument("data", nargs=-1)
def evaluate(session: Session, run: str, data: tuple[str, ...], **options: Any) -> None:
    done = evaluation.evaluate(run, data or None, progress=session.progress, **options)
    report = done.to_dict()
    session.finish(report, format_scores({done.split: done.metrics}, done.chosen_on), failed=report["failed"])

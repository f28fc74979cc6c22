"""embedpipe predict RUN IMAGE_OR_FOLDER..."""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import predict as prediction
from embedpipe.errors import UsageError
from embedpipe.runs import csv_text


@command(prediction.predict, example="embedpipe predict RUN photos/ > labels.csv")
@click.argument("run")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE_OR_FOLDER...")
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="Classes per image, best first.")
@click.option("--probabilities", is_flag=True, help="Add the probabilities of all classes.")
def predict(session: Session, run: str, images: tuple[str, ...], top: int, probabilities: bool, **options: Any) -> None:
    done = prediction.predict(run, images, progress=session.progress, **options)
    if done.task == "regression" and (top > 1 or probabilities):
        raise UsageError(f"{run} predicts a number, without probabilities", hint="leave out --top and --probabilities")
    records = [p.to_dict(top=top, probabilities=probabilities) for p in done.predictions]
    data = {"predictions": records, "failed": [vars(failure) for failure in done.failed]}
    text = "" if session.json else format_csv(done.predictions, top, probabilities)
    session.finish(data, text, failed=data["failed"])


def format_csv(predictions: list[prediction.Prediction], top: int, probabilities: bool) -> str:
    """Return CSV text: `path,label,probability` with `top` rows per image, or `path,value` for regression.

    With `probabilities`, a column for each class follows.
    """
    if predictions and predictions[0].task == "regression":
        return csv_text([("path", "value"), *((one.path, one.label) for one in predictions)]).rstrip("\n")
    classes = predictions[0].classes if probabilities and predictions else ()
    rows = [("path", "label", "probability", *classes)]
    for one in predictions:
        values = [f"{p:.6f}" for p in one.values] if probabilities else []
        for label, probability in one.top(top) if top > 1 else [(one.label, one.probability)]:
            rows.append((one.path, label, "" if probability is None else f"{probability:.6f}", *values))
    return csv_text(rows).rstrip("\n")

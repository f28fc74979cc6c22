"""embedpipe export RUN"""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import export as exporting


@command(exporting.export, example="embedpipe export RUN --format onnx --output classifier/")
@click.argument("run")
def export(session: Session, run: str, **options: Any) -> None:
    done = exporting.export(run, **options)
    images = f"{done.images} {'images of the data set' if done.checked_on == 'dataset' else 'random images'}"
    files = f"{done.folder}: {', '.join(done.files)}"
    session.finish(vars(done), f"{files}\nlogits differ by at most {done.max_abs_diff:.1e} on {images}")

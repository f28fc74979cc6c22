"""embedpipe finetune --unfreeze LAYER [RUN]"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import rich_click as click

from embedpipe import finetuning
from embedpipe.cli._build import Session, command, scores
from embedpipe.config import read_schedule


@command(finetuning.finetune, example="embedpipe finetune --unfreeze layer4")
@click.argument("run", required=False)
@click.option("--schedule", metavar="FILE.yaml", help="List of phases: unfreeze, epochs, lr and other options of each.")
def finetune(session: Session, run: str | None, schedule: str | None, **options: Any) -> None:
    options["schedule"] = read_schedule(Path(schedule), finetuning.finetune) if schedule else None
    report = finetuning.finetune(run, progress=session.progress, **options).report
    if int(os.environ.get("RANK", 0)) and "TORCHELASTIC_RUN_ID" in os.environ:
        return  # the first process of torchrun tells
    title = (
        f"run {report['run']}: {report['trainable_parameters']:,} parameters trained, "
        f"{report['frozen_parameters']:,} frozen, best epoch {report['best_epoch']} "
        f"of {len(report['epochs']) - 1}, {report['seconds']:.1f} s"
    )
    session.finish(report, f"{title}\n{scores(report['metrics'], report['chosen_on'])}")

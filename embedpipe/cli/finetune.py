"""embedpipe finetune --unfreeze LAYER [RUN]"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command, format_scores
from embedpipe.commands import finetune as finetuning
from embedpipe.config import read_schedule
from embedpipe.storage import format_size


@command(finetuning.finetune, example="embedpipe finetune --unfreeze layer4")
@click.argument("run", required=False)
@click.option("--schedule", metavar="FILE.yaml", help="List of phases: unfreeze, epochs, lr and other options of each.")
def finetune(session: Session, run: str | None, schedule: str | None, **options: Any) -> None:
    options["schedule"] = read_schedule(Path(schedule), finetuning.finetune) if schedule else None
    report = finetuning.finetune(run, progress=session.progress, **options).report
    if int(os.environ.get("RANK", 0)) and "TORCHELASTIC_RUN_ID" in os.environ:
        return  # the first process of torchrun reports
    stopped = ", stopped by --patience" if report["stopped"] else ""
    averaged = ", averaged weights" if report["best_of"] == "ema" else ""
    title = (
        f"run {report['run']}: {report['trainable_parameters']:,} parameters trained, "
        f"{report['frozen_parameters']:,} frozen, best epoch {report['best_epoch']} "
        f"of {len(report['epochs']) - 1}{averaged}{stopped}, {report['seconds']:.1f} s"
    )
    lines = [title, _format_source(report["cut"], report["activations"])]
    if report["wise_ft"]:
        lines += [_format_sweep(report["wise_ft"]), ""]
    lines.append(format_scores(report["metrics"], report["chosen_on"]))
    if report["best_epoch"] == 0:
        lr = report["options"]["lr"]
        lines.append(f"no epoch is better on val than the starting weights: try --lr {lr / 10:g} instead of {lr:g}")
    session.finish(report, "\n".join(lines))


def _format_source(cut: str | None, activations: Mapping[str, Any]) -> str:
    """Return what training read, and why."""
    if not activations["cached"]:
        return f"images in every epoch: {activations['reason']}"
    size = f"{activations['rows']:,} rows, {format_size(activations['bytes'])}, {activations['reused']:,} reused"
    return f"activations at {cut}: {size} ({activations['reason']})"


def _format_sweep(wise_ft: Mapping[str, Any]) -> str:
    """Return the scores of WiSE-FT as a table: alpha 0 is the network before training, 1 after it."""
    lines = [f"{'alpha':<6} {'val accuracy':>12} {'log loss':>9}"]
    for row in wise_ft["sweep"]:
        mark = "  kept" if row["alpha"] == wise_ft["chosen"] else ""
        lines.append(f"{row['alpha']:<6.1f} {row['val_accuracy']:>12.4f} {row['val_loss']:>9.4f}{mark}")
    return "\n".join(lines)

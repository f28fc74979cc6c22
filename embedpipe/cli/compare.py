"""embedpipe compare RUN RUN..."""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import compare as comparison


@command(comparison.compare, example="embedpipe compare HEAD_RUN FINETUNED_RUN")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
def compare(session: Session, runs: tuple[str, ...], **options: Any) -> None:
    done = comparison.compare(runs, **options)
    session.finish(done.to_dict(), format_comparison(done))


def format_comparison(done: comparison.Comparison) -> str:
    """Return a table with one row per run: its accuracy, and its difference to the first run."""
    width = max(len(run.run) for run in done.runs)
    lines = [
        f"{done.n} images of {done.split}; differences are to the first run",
        f"{'run':<{width}} {'accuracy':>9}  {'95 % interval':<16} {'difference':>10}  {'95 % interval':<18} "
        f"{'only first':>10} {'only this':>9} {'p':>8} {'log loss':>9}",
    ]
    for run, pair in zip(done.runs, (None, *done.pairs), strict=True):
        interval = "{:.4f} - {:.4f}".format(*run.accuracy_ci95)
        versus = ""
        if pair:
            difference = "{:+.4f} to {:+.4f}".format(*pair.difference_ci95)
            versus = f"{pair.difference:>+10.4f}  {difference:<18} {pair.b:>10} {pair.c:>9} {pair.p_value:>8.2g}"
        loss = "" if run.log_loss is None else f"{run.log_loss:.4f}"
        lines.append(f"{run.run:<{width}} {run.accuracy:>9.4f}  {interval:<16} {versus:<60} {loss:>9}")
    lines += [f"features of {one.other}: CKA {one.cka:.3f} with {one.run}" for one in done.pairs if one.cka is not None]
    if done.chosen_on:
        runs = ", ".join(done.chosen_on)
        lines.append(f"{done.split} was used to make {runs}: only scores on test hold for new images")
    return "\n".join(lines)

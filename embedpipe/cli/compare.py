"""embedpipe compare RUN RUN..."""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import compare as comparing


@command(comparing.compare, example="embedpipe compare HEAD_RUN FINETUNED_RUN")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
def compare(session: Session, runs: tuple[str, ...], **options: Any) -> None:
    done = comparing.compare(runs, **options)
    session.finish(done.to_dict(), to_table(done))


def to_table(done: comparing.Comparison) -> str:
    """Return a row a run: its accuracy, and how it differs from the first."""
    width = max(len(one.run) for one in done.runs)
    lines = [
        f"{done.n} images of {done.split}; differences are to the first run",
        f"{'run':<{width}} {'accuracy':>9}  {'95 % interval':<16} {'difference':>10}  {'95 % interval':<18} "
        f"{'only first':>10} {'only this':>9} {'p':>8} {'log loss':>9}",
    ]
    for one, pair in zip(done.runs, (None, *done.pairs), strict=True):
        low, high = one.accuracy_ci95
        versus = " " * 60
        if pair:
            span = "{:+.4f} to {:+.4f}".format(*pair.difference_ci95)
            versus = f"{pair.difference:>+10.4f}  {span:<18} {pair.b:>10} {pair.c:>9} {pair.p_value:>8.2g}"
        loss = "" if one.log_loss is None else f"{one.log_loss:.4f}"
        lines.append(f"{one.run:<{width}} {one.accuracy:>9.4f}  {f'{low:.4f} - {high:.4f}':<16} {versus:<60} {loss:>9}")
    lines += [f"features of {one.other}: CKA {one.cka:.3f} with {one.run}" for one in done.pairs if one.cka is not None]
    if done.chosen_on:
        lines.append(f"{done.split} was used to make {', '.join(done.chosen_on)}: only test speaks for new images")
    return "\n".join(lines)

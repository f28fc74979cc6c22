"""embedpipe audit [DATASET]"""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import audit as auditing

MAX_SHOWN = 20  # images of each kind


@command(auditing.audit, example="embedpipe audit --folds 10")
@click.argument("dataset", required=False)
def audit(session: Session, dataset: str | None, **options: Any) -> None:
    done = auditing.audit(dataset, **options)
    session.finish(done.to_dict(), format_audit(done))


def format_audit(done: auditing.Audit) -> str:
    """Return a table of the worst images of each kind, and the path of the CSV file with all."""
    lines = [f"{'score':>6}  {'kind':<9}  image"]
    for kind, count in done.counts.items():
        for issue in [issue for issue in done.issues if issue.kind == kind][:MAX_SHOWN]:
            label = f"{issue.label} > {issue.suggested}" if issue.suggested else issue.label
            copy = f", copy of {issue.twin}" if issue.twin else ""
            lines.append(f"{issue.score:>6.3f}  {kind:<9}  {issue.path} ({label}{copy})")
        lines += [f"{'':>6}  {kind:<9}  and {count - MAX_SHOWN} more"] if count > MAX_SHOWN else []
    counts = ", ".join(f"{count} {kind}" for kind, count in done.counts.items())
    return "\n".join([*lines, f"{done.dataset}: {done.n} labelled images, {counts}; all in {done.csv}"])

"""embedpipe audit [DATASET]"""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import audit as auditing

SHOWN = 20


@command(auditing.audit, example="embedpipe audit --folds 10")
@click.argument("dataset", required=False)
def audit(session: Session, dataset: str | None, **options: Any) -> None:
    done = auditing.audit(dataset, **options)
    session.finish(done.to_dict(), tell(done))


def tell(done: auditing.Audit) -> str:
    """Return the worst of each kind, and where all are listed."""
    lines = [f"{'score':>6}  {'kind':<9}  image"]
    for kind, count in done.counts.items():
        issues = [issue for issue in done.issues if issue.kind == kind]
        for one in issues[:SHOWN]:
            said = f"{one.label} > {one.suggested}" if one.suggested else one.label
            twin = f", copy of {one.twin}" if one.twin else ""
            lines.append(f"{one.score:>6.3f}  {kind:<9}  {one.path} ({said}{twin})")
        lines += [f"{'':>6}  {kind:<9}  and {count - SHOWN} more"] if count > SHOWN else []
    counts = ", ".join(f"{count} {kind}" for kind, count in done.counts.items())
    return "\n".join([*lines, f"{done.dataset}: {done.n} labelled images, {counts}; all in {done.csv}"])

"""embedpipe models [PATTERN]"""

from __future__ import annotations

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.errors import UsageError


@command(None, example="embedpipe models 'resnet*'")
@click.argument("pattern", required=False)
def models(session: Session, pattern: str | None) -> None:
    """List the names of backbones.

    Parameters
    ----------
    pattern : str
        Shell-style pattern, such as '*vit*'; default: all.
    """
    from embedpipe.backbones import list_models

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no model matches {pattern!r}", hint="try a part of a name, such as 'resnet', or '*vit*'")
    session.finish({"models": names}, "\n".join(names))

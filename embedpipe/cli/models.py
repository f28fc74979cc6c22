"""embedpipe models [PATTERN]"""

from __future__ import annotations

import rich_click as click

from embedpipe.cli._build import Session, command


@command(None, example="embedpipe models 'resnet*'")
@click.argument("pattern", required=False)
def models(session: Session, pattern: str | None) -> None:
    """List the backbones that can be named.

    Parameters
    ----------
    pattern : str
        Shell-style pattern such as '*vit*'; default: all.
    """
    from embedpipe.backbones import list_models

    names = list_models(pattern)
    session.finish({"models": names}, "\n".join(names))

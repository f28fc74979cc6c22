"""embedpipe demo"""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from embedpipe.cli._build import Session, command


@command(None, example="embedpipe demo --dir embedpipe-demo")
@click.option("--dir", "folder", default="embedpipe-demo", show_default=True, help="Where the demo works.")
@click.option("--quick", is_flag=True, help="A few images and epochs: shows the way, not the accuracy.")
def demo(session: Session, folder: str, quick: bool) -> None:
    """Guided first run: digits on disk, extract, fit-head, finetune, predict. Needs no network."""
    from embedpipe.commands.demo import run_demo

    say = session.note if session.json else click.echo
    session.finish(run_demo(Path(folder), quick=quick, say=say), "")

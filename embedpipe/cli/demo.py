"""embedpipe demo"""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from embedpipe.cli._build import Session, command


@command(None, example="embedpipe demo --dir embedpipe-demo")
@click.option("--dir", "folder", default="embedpipe-demo", show_default=True, help="Folder for images, cache and runs.")
@click.option("--quick", is_flag=True, help="Use few images and epochs: faster, with a lower accuracy.")
def demo(session: Session, folder: str, quick: bool) -> None:
    """Write handwritten digits to disk, then extract, fit a head, fine-tune and predict. Needs no network."""
    from embedpipe.commands.demo import run_demo

    say = session.note if session.json else click.echo
    session.finish(run_demo(Path(folder), quick=quick, say=say), "")

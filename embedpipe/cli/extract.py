"""embedpipe extract DATA..."""

from __future__ import annotations

from typing import Any

import rich_click as click

from embedpipe import extraction
from embedpipe.cli._build import Session, command


@command(extraction.extract, example="embedpipe extract data/ --backbone timm:resnet50")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--backbone",
    multiple=True,
    default=("timm:resnet18",),
    show_default=True,
    help="timm:NAME, torchvision:NAME or a model folder; repeatable. A bare name means timm.",
)
def extract(session: Session, data: tuple[str, ...], backbone: tuple[str, ...], **options: Any) -> None:
    found = extraction.extract(data, backbone, progress=session.progress, **options).summary
    for failure in found["failed"]:
        session.note(f"failed: {failure['path']} ({failure['stage']}): {failure['reason']}")
    lines = [
        f"{found['dataset']}: {found['images']} images, {len(found['classes'])} classes, {counts(found['splits'])}"
    ]
    lines += [
        f"{space['space']}: {space['feature_dim']} features, {space['computed']} computed, {space['reused']} reused"
        for space in found["spaces"]
    ]
    lines.append(
        f"{found['seconds']:.1f} s, {found['images_per_second']:.1f} images/s, "
        f"{len(found['failed'])} failed, {found['ignored']} other files ignored"
    )
    session.finish(found, "\n".join(lines), failed=len(found["failed"]))


def counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in splits.items())

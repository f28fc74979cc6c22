"""embedpipe extract DATA..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import extract as extraction
from embedpipe.storage import format_size


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
    if "dry_run" in found:
        session.finish(found, tell_plan(found))
    else:
        session.finish(found, tell(found), failed=found["failed"])


def learnt(found: Mapping[str, Any]) -> str:
    """Return what there is to learn of each image."""
    if found["task"] == "regression":
        return "a number each"
    return f"{len(found['classes'])} {'labels' if found['task'] == 'multilabel' else 'classes'}"


def tell(found: Mapping[str, Any]) -> str:
    """Return what was done, a line a space, and which stage set the pace."""
    lines = [
        f"{found['dataset']}: {found['images']} images, {learnt(found)}, {counts(found['splits'])}",
        *(
            f"{space['space']}: {space['feature_dim']} features, {space['computed']} computed, {space['reused']} reused"
            for space in found["spaces"]
        ),
        f"{found['seconds']:.1f} s, {found['images_per_second']:.1f} images/s, "
        f"{len(found['failed'])} failed, {found['ignored']} other files ignored",
    ]
    return "\n".join([*lines, found["advice"]] if found["advice"] else lines)


def tell_plan(found: Mapping[str, Any]) -> str:
    """Return what would be done, a line a space."""
    lines = [
        f"{space['space']}: {space['misses']} to compute ({format_size(space['bytes'])}), {space['hits']} there"
        for space in found["spaces"]
    ]
    took = (
        f"{found['seconds_expected']:.0f} s expected ({found['measured_images']} images measured, {found['executor']})"
    )
    return "\n".join([f"{found['images']} images, {counts(found['splits'])}", *lines, took, "nothing was written"])


def counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in splits.items())

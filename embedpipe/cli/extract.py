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
        session.finish(found, format_plan(found))
    else:
        session.finish(found, format_report(found), failed=found["failed"])


def format_targets(found: Mapping[str, Any]) -> str:
    """Return the number of classes or labels, or that targets are numbers."""
    if found["task"] == "regression":
        return "numbers"
    return f"{len(found['classes'])} {'labels' if found['task'] == 'multilabel' else 'classes'}"


def format_report(found: Mapping[str, Any]) -> str:
    """Return the summary of an extraction: one line per space, and the bottleneck."""
    lines = [
        f"{found['dataset']}: {found['images']} images, {format_targets(found)}, {counts(found['splits'])}",
        *(
            f"{space['space']}: {space['feature_dim']} features, {space['computed']} computed, {space['reused']} reused"
            for space in found["spaces"]
        ),
        f"{found['seconds']:.1f} s, {found['images_per_second']:.1f} images/s, "
        f"{len(found['failed'])} failed, {found['ignored']} other files ignored",
    ]
    return "\n".join([*lines, found["advice"]] if found["advice"] else lines)


def format_plan(found: Mapping[str, Any]) -> str:
    """Return the summary of a dry run: one line per space, and the expected time."""
    lines = [
        f"{space['space']}: {space['misses']} to compute ({format_size(space['bytes'])}), {space['hits']} there"
        for space in found["spaces"]
    ]
    measured = f"{found['measured_images']} images measured, {found['executor']}"
    estimate = f"{found['seconds_expected']:.0f} s expected ({measured})"
    return "\n".join([f"{found['images']} images, {counts(found['splits'])}", *lines, estimate, "nothing was written"])


def counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in splits.items())

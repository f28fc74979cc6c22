"""embedpipe cache ls|info|why|verify|gc|rm|export"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import rich_click as click

from embedpipe.cli._build import CommandGroup, Session, command, shared_options
from embedpipe.commands import cache as caching
from embedpipe.commands import verify as verification
from embedpipe.errors import CacheMismatch
from embedpipe.storage import format_size


@command(caching.list_cache, example="embedpipe cache ls")
def ls(session: Session, **options: Any) -> None:
    found = caching.list_cache(**options)
    session.finish(asdict(found), format_listing(found))


def format_listing(found: caching.Listing) -> str:
    """Return a table of spaces and a table of data sets; "?" stands for what cannot be read from a damaged file."""
    lines = [f"{'rows':>9} {'size':>9} {'shards':>6}  {'last used':<20}  space"]
    for space in found.spaces:
        rows, shards = ("?" if count is None else count for count in (space.rows, space.pending_shards))
        name = f"{space.backbone} {space.layer}{', interrupted' if space.interrupted else ''}"
        state = space.damage or space.unsupported or name
        size = format_size(space.bytes)
        lines.append(f"{rows:>9} {size:>9} {shards:>6}  {space.last_used:<20}  {space.space}  ({state})")
    lines.append(f"\n{'images':>9} {'classes':>9}  data set")
    for data in found.datasets:
        counts = f"{data.images:>9} {len(data.classes or []):>9}" if data.damage is None else f"{'?':>9} {'?':>9}"
        lines.append(f"{counts}  {data.dataset}  ({data.damage or ', '.join(data.sources or [])})")
    return "\n".join(lines)


@command(caching.describe_space, example="embedpipe cache info timm-resnet18")
@click.argument("space")
def info(session: Session, space: str, **options: Any) -> None:
    found = caching.describe_space(space, **options)
    session.finish(found, json.dumps(found, indent=2))


@command(verification.explain_reuse, example="embedpipe cache why data/ --backbone timm:resnet18 --image-size 288")
@click.argument("dataset", required=False)
@click.option("--backbone", default="timm:resnet18", show_default=True, help="As in extract.")
def why(session: Session, dataset: str | None, **options: Any) -> None:
    found = verification.explain_reuse(dataset, **options)
    lines = [
        f"{found.dataset}: {found.images} different images",
        f"{found.space}: {found.hits} hits, {found.misses} misses, {found.failures} recorded failures"
        f"{'' if found.exists else ' (this space does not exist yet)'}",
    ]
    if found.nearest:
        lines += [f"nearest: {found.nearest}, {found.nearest_hits} hits", *(f"  {field}" for field in found.differing)]
    session.finish(found.to_dict(), "\n".join(lines))


@command(verification.verify_cache, example="embedpipe cache verify --sample 32")
@click.argument("names", nargs=-1, metavar="[DATASET or SPACE]...")
def verify(session: Session, names: tuple[str, ...], **options: Any) -> None:
    done = verification.verify_cache(names, progress=session.progress, **options)
    lines = [f"{finding.kind}: {finding.place}: {finding.detail}" for finding in done.findings]
    lines += [
        f"{space.space}: {space.rows} rows; {space.recomputed} computed again, which differ from the stored rows by at most "
        f"{space.max_relative_difference:.1e} of their length"
        for space in done.spaces
    ]
    lines.append(f"{done.files} image files have the bytes that they were extracted from")
    hint = "remove what is damaged (`embedpipe cache rm`) and extract again"
    error = CacheMismatch(f"the cache is damaged in {len(done.damage)} places", hint=hint) if done.damaged else None
    session.finish({**asdict(done), "damaged": done.damaged}, "\n".join(lines), error=error)


@command(caching.collect_garbage, example="embedpipe cache gc --max-size 10GB --older-than 30d --dry-run")
def gc(session: Session, **options: Any) -> None:
    done = caching.collect_garbage(**options)
    session.finish(asdict(done), format_removed(done))


@command(caching.remove_from_cache, example="embedpipe cache rm timm-resnet18-0a1b2c")
@click.argument("names", nargs=-1, required=True, metavar="SPACE|DATASET...")
def rm(session: Session, names: tuple[str, ...], **options: Any) -> None:
    done = caching.remove_from_cache(names, **options)
    session.finish(asdict(done), format_removed(done))


def format_removed(done: caching.Removal) -> str:
    """Return what was removed, what could not be, and the bytes freed and left."""
    lines = [f"{item['name']}: {format_size(item['bytes'])}, {item['reason']}" for item in done.removed]
    lines += [f"not removed: {item['reason']}" for item in done.skipped]
    freed = "would be freed" if done.dry_run else "freed"
    return "\n".join([*lines, f"{format_size(done.freed_bytes)} {freed}, {format_size(done.left_bytes)} left"])


@command(caching.export_features, example="embedpipe cache export --format parquet --out features.parquet")
@click.argument("dataset", required=False)
def export(session: Session, dataset: str | None, **options: Any) -> None:
    done = caching.export_features(dataset, **options)
    size = format_size(done["bytes"])
    session.finish(done, f"{done['path']}: {done['rows']} rows of {done['feature_dim']} features, {size}")


cache = CommandGroup(
    name="cache",
    help="Inspect, verify, prune and export the feature cache.\n\nExample: `embedpipe cache verify`",
    params=[*shared_options()],
    commands={member.name or "": member for member in (ls, info, why, verify, gc, rm, export)},
)

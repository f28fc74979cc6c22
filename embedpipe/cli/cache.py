"""embedpipe cache ls|info|why|verify|gc|rm|export"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, Verbs, command, shared_options
from embedpipe.commands import cache as caretaking
from embedpipe.commands import verify as proving
from embedpipe.errors import CacheMismatch
from embedpipe.storage import show_size


@command(caretaking.list_cache, example="embedpipe cache ls")
def ls(session: Session, **options: Any) -> None:
    found = caretaking.list_cache(**options)
    lines = [f"{'rows':>9} {'size':>9} {'shards':>6}  {'last used':<20}  space"]
    for one in found.spaces:
        rows = "?" if one.rows is None else one.rows
        state = (
            one.damage or one.unsupported or (f"{one.backbone} {one.layer}{', interrupted' if one.interrupted else ''}")
        )
        shards = "?" if one.pending_shards is None else one.pending_shards
        lines.append(f"{rows:>9} {show_size(one.bytes):>9} {shards:>6}  {one.last_used:<20}  {one.space}  ({state})")
    lines.append(f"\n{'images':>9} {'classes':>9}  data set")
    for data in found.datasets:
        counts = f"{data.images:>9} {len(data.classes or []):>9}" if data.damage is None else f"{'?':>9} {'?':>9}"
        lines.append(f"{counts}  {data.dataset}  ({data.damage or ', '.join(data.sources or [])})")
    session.finish(asdict(found), "\n".join(lines))


@command(caretaking.describe_space, example="embedpipe cache info timm-resnet18")
@click.argument("space")
def info(session: Session, space: str, **options: Any) -> None:
    found = caretaking.describe_space(space, **options)
    session.finish(found, json.dumps(found, indent=2))


@command(proving.explain_reuse, example="embedpipe cache why data/ --backbone timm:resnet18 --image-size 288")
@click.argument("dataset", required=False)
@click.option("--backbone", default="timm:resnet18", show_default=True, help="As in extract.")
def why(session: Session, dataset: str | None, **options: Any) -> None:
    found = proving.explain_reuse(dataset, **options)
    lines = [
        f"{found.dataset}: {found.images} different images",
        f"{found.space}: {found.hits} hits, {found.misses} misses, {found.failures} recorded failures"
        f"{'' if found.exists else ' (there is no such space yet)'}",
    ]
    if found.nearest:
        lines.append(f"nearest: {found.nearest}, {found.nearest_hits} hits")
        lines += [f"  {one}" for one in found.differing]
    session.finish(found.to_dict(), "\n".join(lines))


@command(proving.verify_cache, example="embedpipe cache verify --sample 32")
@click.argument("names", nargs=-1, metavar="[DATASET or SPACE]...")
def verify(session: Session, names: tuple[str, ...], **options: Any) -> None:
    done = proving.verify_cache(names, progress=session.progress, **options)
    lines = [f"{one.kind}: {one.place}: {one.detail}" for one in done.findings]
    lines += [
        f"{one.space}: {one.rows} rows, {one.recomputed} computed again, at most {one.max_relative_difference:.1e} "
        f"of a row's length from what is stored"
        for one in done.spaces
    ]
    lines.append(f"{done.files} image files have the bytes that they were extracted from")
    hint = "remove what is damaged (`embedpipe cache rm`) and extract again"
    error = CacheMismatch(f"found damage in the cache, {len(done.damage)} times", hint=hint) if done.damaged else None
    session.finish({**asdict(done), "damaged": done.damaged}, "\n".join(lines), error=error)


@command(caretaking.collect_garbage, example="embedpipe cache gc --max-size 10GB --older-than 30d --dry-run")
def gc(session: Session, **options: Any) -> None:
    tell_removed(session, caretaking.collect_garbage(**options))


@command(caretaking.remove_from_cache, example="embedpipe cache rm timm-resnet18-0a1b2c")
@click.argument("names", nargs=-1, required=True, metavar="SPACE|DATASET...")
def rm(session: Session, names: tuple[str, ...], **options: Any) -> None:
    tell_removed(session, caretaking.remove_from_cache(names, **options))


def tell_removed(session: Session, done: caretaking.Removal) -> None:
    """Say what went, what was left alone, and the bytes."""
    lines = [f"{one['name']}: {show_size(one['bytes'])}, {one['reason']}" for one in done.removed]
    lines += [f"left alone: {one['reason']}" for one in done.skipped]
    verb = "would be freed" if done.dry_run else "freed"
    lines.append(f"{show_size(done.freed_bytes)} {verb}, {show_size(done.left_bytes)} left")
    session.finish(asdict(done), "\n".join(lines))


@command(caretaking.export_features, example="embedpipe cache export --format parquet --out features.parquet")
@click.argument("dataset", required=False)
def export(session: Session, dataset: str | None, **options: Any) -> None:
    done = caretaking.export_features(dataset, **options)
    session.finish(done, f"{done['path']}: {done['rows']} rows of {done['feature_dim']}, {show_size(done['bytes'])}")


cache = Verbs(
    name="cache",
    help="List, explain, prove, shrink and leave with what is cached.\n\nExample: `embedpipe cache verify`",
    params=[*shared_options()],
    commands={one.name or "": one for one in (ls, info, why, verify, gc, rm, export)},
)

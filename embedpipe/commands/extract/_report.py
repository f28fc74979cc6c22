"""The JSON of `extract` and of its dry run, and the advice on what to change when one stage is the bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedpipe.cache import Space
from embedpipe.commands.extract._requests import Result
from embedpipe.data import Manifest
from embedpipe.inference import has_openvino

ADVICE = {
    "decode": "decoding is the bottleneck: use more cores (--workers), smaller files, or pip install 'embedpipe[fast-decode]'",
    "forward": "the backbone is the bottleneck: use a GPU, a smaller backbone or a smaller --image-size",
    "commit": "the disk is the bottleneck: use a --cache-dir on a faster one, or a larger --shard-rows",
}
INSTALL = "; on this CPU, pip install 'embedpipe[openvino]' may double the speed"


def describe(manifest: Manifest, dataset: str, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Return the JSON of the command; the fields of the first space are repeated at the top."""
    spaces = [describe_result(result) for result in results]
    computed = sum(space["computed"] for space in spaces)
    return {
        **spaces[0],
        "dataset": dataset,
        "spaces": spaces,
        **_describe_manifest(manifest),
        "advice": advise(results),
        "seconds": round(seconds, 3),
        "images_per_second": round(computed / seconds, 2),
    }


def describe_result(result: Result) -> dict[str, Any]:
    """Return the JSON of one space."""
    name, _, space, filled = result
    return {
        "backbone": name,
        "layer": space.spec["layer"],
        "view": space.spec["view"],
        "fingerprint": space.fingerprint,
        "space": str(space.folder),
        "features": str(space.features_path),
        "feature_dim": space.feature_dim,
        "rows": len(space.view()),
        "computed": filled.computed,
        "reused": filled.reused,
        "pending_shards": space.pending_shards,
        "failed": [vars(failure) for failure in filled.failed],
        "bottleneck": filled.bottleneck,
        "executor": filled.executor,
        "executor_difference": filled.difference,
    }


def advise(results: Sequence[Result]) -> str:
    """Return which stage is the bottleneck and what to change; empty if nothing was computed."""
    filled = next((filled for *_, filled in results if filled.bottleneck != "none"), None)
    if filled is None:
        return ""
    install = filled.bottleneck == "forward" and filled.executor == "eager" and not has_openvino()
    return ADVICE[filled.bottleneck] + (INSTALL if install else "")


def describe_plan(
    manifest: Manifest, spaces: Sequence[tuple[Space, int, int, int, int]], run: tuple[float, int, str]
) -> dict[str, Any]:
    """Return the JSON of a dry run, from what `plan_spaces` returns."""
    planned = [
        {
            "space": str(space.folder),
            "fingerprint": space.fingerprint,
            "layer": space.spec["layer"],
            "view": space.spec["view"],
            "feature_dim": feature_dim,
            "hits": stored,
            "misses": missing,
            "bytes": missing_bytes,
        }
        for space, feature_dim, missing, stored, missing_bytes in spaces
    ]
    seconds, measured, executor = run
    totals = {name: sum(one[name] for one in planned) for name in ("hits", "misses", "bytes")}
    return {
        "dry_run": True,
        **_describe_manifest(manifest),
        "spaces": planned,
        **totals,
        "seconds_expected": round(seconds, 1),
        "measured_images": measured,
        "executor": executor,
    }


def _describe_manifest(manifest: Manifest) -> dict[str, Any]:
    return {
        "images": len(manifest.samples) + len(manifest.unreadable),
        "ignored": manifest.ignored,
        "task": manifest.task,
        "classes": list(manifest.classes),
        "splits": manifest.splits,
    }

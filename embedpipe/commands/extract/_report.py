"""What `extract` tells: the JSON of the verb, and what to change when a stage holds the others up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedpipe.commands.extract._requests import Extracted
from embedpipe.data import Manifest
from embedpipe.inference import Planned

ADVICE = {
    "decode": "decoding sets the pace: give it more cores (--workers), smaller files, or pip install 'embedpipe[fast-decode]'",
    "forward": "the backbone sets the pace: use a GPU, a smaller backbone or a smaller --image-size",
    "commit": "the disk sets the pace: name a --cache-dir on a faster one, or a larger --shard-rows",
}
INSTALL = "; on this CPU, pip install 'embedpipe[openvino]' may double it"


def describe(manifest: Manifest, dataset: str, extracted: Sequence[Extracted], seconds: float) -> dict[str, Any]:
    """Return the JSON of the verb; the scalars of the first space are mirrored at the top."""
    spaces = [one.to_dict() for one in extracted]
    computed = sum(space["computed"] for space in spaces)
    return {
        **spaces[0],
        "dataset": dataset,
        "spaces": spaces,
        **_of_manifest(manifest),
        "advice": advise(extracted),
        "seconds": round(seconds, 3),
        "images_per_second": round(computed / seconds, 2),
    }


def advise(extracted: Sequence[Extracted]) -> str:
    """Return which stage set the pace and what to change; empty where nothing was computed."""
    from embedpipe.inference import has_openvino

    filled = next((one.filled for one in extracted if one.filled.bottleneck != "none"), None)
    if filled is None:
        return ""
    install = filled.bottleneck == "forward" and filled.executor == "eager" and not has_openvino()
    return ADVICE[filled.bottleneck] + (INSTALL if install else "")


def describe_plan(manifest: Manifest, planned: Planned) -> dict[str, Any]:
    """Return the JSON of a dry run."""
    spaces = [
        {
            "space": str(one.space.folder),
            "fingerprint": one.space.fingerprint,
            "layer": one.space.spec["layer"],
            "view": one.space.spec["view"],
            "feature_dim": one.feature_dim,
            "hits": one.present,
            "misses": one.missing,
            "bytes": one.bytes,
        }
        for one in planned.spaces
    ]
    return {
        "dry_run": True,
        **_of_manifest(manifest),
        "spaces": spaces,
        "hits": sum(one.present for one in planned.spaces),
        "misses": sum(one.missing for one in planned.spaces),
        "bytes": sum(one.bytes for one in planned.spaces),
        "seconds_expected": round(planned.seconds, 1),
        "measured_images": planned.measured,
        "executor": planned.executor,
    }


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    return {
        "images": len(manifest.samples) + len(manifest.unreadable),
        "ignored": manifest.ignored,
        "task": manifest.task,
        "classes": list(manifest.classes),
        "splits": manifest.splits,
    }

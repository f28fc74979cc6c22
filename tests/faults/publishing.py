"""A process that publishes all that embedpipe publishes, without torch, and says what is safe as soon as it is.

Its twin appends to plain HDF5 and flushes: what a harness must find wanting.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import embedpipe
from embedpipe.cache import Cache, Space
from embedpipe.data import Manifest, Sample, Source
from embedpipe.errors import EmbedpipeError
from embedpipe.runs import new_run

PACKAGE = Path(embedpipe.__file__).parent
SPEC = {"schema": 1, "source": "timm", "architecture": "resnet18", "layer": "penultimate"}
ROWS, DIM, SHARD_ROWS = 24, 8, 4
KEYS = [hashlib.sha256(b"%d" % i).digest() for i in range(ROWS)]
KEY_BYTES = np.frombuffer(b"".join(KEYS), np.uint8).reshape(ROWS, 32)
PLAIN_ROWS = 320
X = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
BROKEN = bytes(32)
PINS = {"batch_size": 4}
MANIFEST = Manifest(
    name="data",
    sources=(Source("data", Path("/data")),),
    samples=tuple(Sample(f"a/{i}.png", "a", "train", None, key, 0) for i, key in enumerate(KEYS)),
    classes=("a",),
    ignored=0,
    unreadable=(),
    warnings=(),
)
Say = Callable[[dict[str, Any]], None]


def space_of(root: Path) -> Space:
    return Cache(root / "cache").open_space(SPEC)


def publish_all(root: Path, say: Say) -> int:
    """Fill a space twice, each time merging its shards; then a sample table, latest.json and a run. Return rows computed."""
    space = space_of(root)
    computed = fill(space, ROWS // 2, say) + fill(space, ROWS, say)
    cache = Cache(root / "cache")
    name = cache.write_dataset(MANIFEST)
    say({"table": name})
    cache.set_latest(name, [space.folder.name])
    say({"latest": name})
    with new_run(root / "runs", "fit-head") as run:
        run.write_json("run.json", {"verb": "fit-head"})
        (run.folder / "model").mkdir()
        run.write_text("model/weights", "w" * 5000)
    say({"run": run.final.name})
    return computed


def fill(space: Space, limit: int, say: Say) -> int:
    """Compute those of the first `limit` rows that are missing, in shards, and merge them."""
    say({"pins": "may change"})
    with space.writer(feature_dim=DIM, dtype="float32", environment={}, pins=PINS, shard_rows=SHARD_ROWS) as writer:
        say({"pins": "in force"})
        view = space.view()
        say({"rows": [i for i, key in enumerate(KEYS) if key in view]})
        missing = [i for i in range(limit) if KEYS[i] not in view]
        if BROKEN not in view.failures:
            writer.fail(BROKEN, "decode", "truncated", "pillow 13")
            writer.commit()
            say({"failed": 1})
        for start in range(0, len(missing), SHARD_ROWS):
            part = missing[start : start + SHARD_ROWS]
            writer.append([KEYS[i] for i in part], X[part])
            writer.commit()
            say({"rows": part})
        say({"pins": "may change"})
        writer.finish()
        say({"pins": "ended"})
    return len(missing)


def append_plainly(path: Path, say: Say) -> int:
    """Append to a plain HDF5 file and flush, in two sessions; the rows come round again and again."""
    path.parent.mkdir(exist_ok=True)
    for limit in (PLAIN_ROWS // 2, PLAIN_ROWS):
        with h5py.File(path, "a") as file:
            if "features" not in file:
                file.create_dataset("features", (0, DIM), "f4", maxshape=(None, DIM), chunks=(1, DIM))
                file.create_dataset("keys", (0, 32), "u1", maxshape=(None, 32), chunks=(1, 32))
            features, keys = file["features"], file["keys"]
            for i in range(len(keys), limit, SHARD_ROWS):
                part = np.arange(i, i + SHARD_ROWS)
                features.resize(i + SHARD_ROWS, axis=0)
                keys.resize(i + SHARD_ROWS, axis=0)
                features[i:], keys[i:] = X[part % ROWS], KEY_BYTES[part % ROWS]
                file.flush()
                say({"rows": part.tolist()})
    return 0


def main(argv: Sequence[str]) -> int:
    """Publish below a folder: `ours FOLDER`, `plain FOLDER`; with a third word, say which fsync comes next, too."""
    kind, root, *labelled = argv

    def say(message: dict[str, Any]) -> None:
        os.write(1, json.dumps(message).encode() + b"\n")

    if labelled:
        _label_fsyncs(root, say)
    try:
        if kind == "plain":
            return append_plainly(Path(root) / "plain.h5", say)
        say({"computed": publish_all(Path(root), say)})
    except EmbedpipeError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def _label_fsyncs(root: str, say: Say) -> None:
    """Say before each fsync which line of code it is: the functions around it, and what it is about."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        frame, names = sys._getframe(1), []
        while frame is not None:
            if str(PACKAGE) in frame.f_code.co_filename and frame.f_code.co_name not in names:
                names.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        names = names[: names.index("make_folder") + 1 if "make_folder" in names else 3]
        place = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)
        say({"site": f"{' < '.join(names)}: {re.sub(r'[.]tmp-[^/]*', '.tmp', place)}"})
        real(descriptor)

    os.fsync = fsync

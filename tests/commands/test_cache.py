"""embedpipe cache ls, info, why, verify, gc, rm and export, as a user calls them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embedpipe.cache import Cache, Exported, Space, export_writer
from embedpipe.cache._features import write_features
from embedpipe.cache._meta import write_meta
from embedpipe.commands import cache as caretaking
from embedpipe.commands import verify as proving
from tests.conftest import COLOURS, TINY, Ended, Run, write_photo, write_photos

CACHE = Path("cache")
PACKED = Path(__file__).parents[1] / "cache/data/timm-test_resnet-layer4-1b927e8eb040"
VERBS = ("ls", "info", "why", "verify", "gc", "rm", "export")


@pytest.fixture
def extracted(run: Run, photos: Path) -> dict[str, Any]:
    """What extracting 36 photos printed; the cache is `cache` in the present folder."""
    return run("extract", photos, *TINY, "--json").data


def space_of(record: dict[str, Any]) -> Space:
    return Cache(CACHE).find_space(Path(record["space"]).name)


def kinds(done: Ended) -> dict[str, str]:
    """The findings of verify: kind to detail."""
    return {finding["kind"]: finding["detail"] for finding in done.envelope["data"]["findings"]}


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def rewrite(space: Space, features: np.ndarray) -> None:
    """Replace the rows of a space by others, sealed as they should be."""
    keys, meta = space.view().keys, space.meta
    assert meta is not None
    with space.features_path.open("wb") as stream:
        write_features(stream, meta, keys, [features], {})


def stored(space: Space) -> np.ndarray:
    return space.view().read(map(bytes, space.view().keys))


def test_ls_and_info(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    found = run("cache", "ls", "--json")
    assert found.envelope["command"] == "cache ls"
    (space,), (data,) = found.data["spaces"], found.data["datasets"]
    assert (space["backbone"], space["layer"], space["rows"]) == ("timm:test_resnet", "penultimate", 36)
    assert (space["pending_shards"], space["interrupted"], space["damage"]) == (0, False, None)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", space["last_used"])
    assert (data["images"], data["classes"], data["sources"]) == (36, ["blue", "green", "red"], [str(photos)])
    assert found.data["bytes"] == sum(path.stat().st_size for path in CACHE.rglob("*") if path.is_file())

    about = run("cache", "info", "timm-test", "--json").data
    assert about["fingerprint"] == extracted["fingerprint"]
    assert about["environments"][0]["loader"]["weights"] == "none"
    assert about["files"] == {"features.h5": Path(extracted["features"]).stat().st_size}
    for text in (run("cache", "ls").out, run("cache", "info", "timm-test").out):
        assert "timm-test_resnet" in text


def test_ls_shows_what_is_damaged_and_goes_on(run: Run, extracted: dict[str, Any]) -> None:
    flip(space_of(extracted).folder / "meta.json", 40)
    flip(Cache(CACHE).table_path(extracted["dataset"]), 600)
    found = run("cache", "ls", "--json").data
    assert "damaged" in found["spaces"][0]["damage"]
    assert "damaged" in found["datasets"][0]["damage"]
    assert run("cache", "ls").code == 0


def test_a_space_of_packed_rows_is_not_supported_and_not_damaged(
    run: Run, photos: Path, extracted: dict[str, Any]
) -> None:
    """Older versions wrote such spaces: they are listed, explained and removed, and nothing else is disturbed."""
    shutil.copytree(PACKED, CACHE / "spaces" / PACKED.name)
    listed = {space["space"]: space for space in run("cache", "ls", "--json").data["spaces"]}[PACKED.name]
    assert (listed["rows"], listed["damage"], listed["pending_shards"]) == (None, None, 1)
    assert "no longer supported" in listed["unsupported"]
    assert "no longer supported" in run("cache", "ls").out
    about = run("cache", "info", PACKED.name, "--json").data
    assert (about["feature_dim"], about["unsupported"]) == (16, listed["unsupported"])
    verified = run("cache", "verify", "--json")
    assert (verified.code, verified.data["damaged"], kinds(verified)["unsupported"]) == (0, False, about["unsupported"])
    assert [one["space"] for one in verified.data["spaces"]] == [Path(extracted["space"]).name]
    assert run("cache", "why", photos, *TINY[:2], "--weights", "none", "--image-size", 96, "--json").code == 0
    assert run("fit-head", "--json").code == 0
    refused = run("fit-head", "--space", PACKED.name, "--json")
    assert (refused.code, "no longer supported" in refused.line, "damage" in refused.line) == (4, True, False)
    (gone,) = run("cache", "gc", "--unused", "--dry-run", "--json").data["removed"]
    assert (gone["name"], gone["reason"]) == (PACKED.name, about["unsupported"])
    (gone,) = run("cache", "rm", PACKED.name, "--json").data["removed"]
    assert (gone["name"], gone["reason"]) == (PACKED.name, about["unsupported"])
    assert not (CACHE / "spaces" / PACKED.name).exists()


def test_an_empty_cache(run: Run) -> None:
    assert run("cache", "ls", "--json").data == {"spaces": [], "datasets": [], "bytes": 0}
    assert run("cache", "verify", "--json").data["findings"] == []
    assert run("cache", "gc", "--unused", "--json").data["removed"] == []
    for words in (["info", "x"], ["why"], ["rm", "x"], ["export"], ["gc"], ["verify", "x"], ["verify", "--sample", -1]):
        assert run("cache", *words).code == 2
        assert not CACHE.exists()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--image-size", 96], {"transform.crop_size", "transform.resize_size"}),
        (["--crop-pct", 0.7], {"transform.resize_size"}),
        (["--interpolation", "nearest"], {"transform.interpolation"}),
        (["--layer", "layer2"], {"layer", "pool"}),
        (["--precision", "bf16"], {"precision"}),
        (["--store-dtype", "float16"], {"stored_dtype"}),
        (["--seed", 1], {"weights"}),
    ],
)
def test_why_names_the_field_that_differs(
    run: Run, photos: Path, extracted: dict[str, Any], options: list[object], fields: set[str]
) -> None:
    found = run("cache", "why", photos, *TINY, *options, "--json").data
    assert {one["field"] for one in found["differing"]} == fields
    assert (found["hits"], found["misses"], found["nearest_hits"], found["exists"]) == (0, 36, 36, False)
    assert found["nearest"] == Path(extracted["space"]).name
    lines = run("cache", "why", photos, *TINY, *options).out.splitlines()
    assert {line.strip().partition(":")[0] for line in lines if " -> " in line} == fields
    assert not any(re.search("[0-9a-f]{20}", line) for line in lines)
    assert len(Cache(CACHE).spaces()) == 1
    run("extract", photos, *TINY, *options)  # and the extraction says the same
    again = run("cache", "why", photos, *TINY, *options, "--json").data
    assert (again["space"], again["hits"], again["nearest"]) == (found["space"], 36, None)


def test_why_takes_the_nearest_space(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    run("extract", photos, *TINY, "--image-size", 64, "--precision", "bf16", "--store-dtype", "float16")
    for options, fields in (
        ([], ["weights"]),
        (["--image-size", 64, "--precision", "bf16"], ["stored_dtype", "weights"]),
    ):
        found = run("cache", "why", photos, *TINY, "--seed", 1, *options, "--json").data
        assert [one["field"] for one in found["differing"]] == fields


def test_why_names_the_pool(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY, "--layer", "layer2")
    found = run("cache", "why", photos, *TINY, "--layer", "layer2", "--pool", "max", "--json").data
    assert [one["field"] for one in found["differing"]] == ["pool"]


def test_why_reads_the_folder_as_it_is_now(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    write_photo(photos / "red" / "new.png", COLOURS["red"], 77)
    (photos / "red" / "bad.png").write_bytes(b"no image")
    run("extract", photos, *TINY)
    write_photo(photos / "red" / "newer.png", COLOURS["red"], 78)
    now = run("cache", "why", photos, *TINY, "--json").data
    assert (now["images"], now["hits"], now["misses"], now["failures"], now["exists"]) == (39, 37, 1, 1, True)
    before = run("cache", "why", *TINY, "--json").data
    assert (before["images"], before["misses"]) == (38, 0)


def test_verify_of_a_sound_cache(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    done = run("cache", "verify", "--json")
    assert (done.code, done.data["findings"], done.data["damaged"]) == (0, [], False)
    assert done.data["files"] == 36
    (space,) = done.data["spaces"]
    assert (space["recomputed"], space["max_relative_difference"]) == (8, 0)
    counts = [run("cache", "verify", *flags, "--json").data["spaces"][0]["recomputed"] for flags in (
        ["--sample", 0], ["--sample", 5], ["--all"], [Path(extracted["space"]).name])]  # fmt: skip
    assert counts == [0, 5, 36, 8]
    assert run("cache", "verify", photos, "--json").data["spaces"] == []


PLACES = {
    "features": lambda space: (space.features_path, -1),
    "keys": lambda space: (
        space.features_path,
        space.features_path.read_bytes().index(min(map(bytes, space.view().keys))),
    ),
    "head": lambda space: (space.features_path, 520),
    "user block": lambda space: (space.features_path, 3),
    "meta.json": lambda space: (space.folder / "meta.json", 100),
    "table": lambda space: (next((CACHE / "datasets").iterdir()), 700),
    "latest.json": lambda space: (CACHE / "latest.json", 16),
}


@pytest.mark.parametrize("name", PLACES)
def test_verify_finds_a_flipped_bit(run: Run, extracted: dict[str, Any], name: str) -> None:
    path, place = PLACES[name](space_of(extracted))
    flip(path, place)
    done = run("cache", "verify", "--sample", 0, "--json")
    assert (done.code, done.envelope["ok"], done.envelope["error"]["code"]) == (4, False, "CacheMismatch")
    (damage,) = done.envelope["data"]["findings"]  # and no rows are called orphaned where a table cannot be read
    assert damage["kind"] == "damage"
    assert damage["place"] in (str(path), str(path.parent))
    told = run("cache", "verify", "--sample", 0)
    assert (told.code, str(path) in told.out) == (4, True)
    assert "the cache is damaged in 1 places" in told.line


def test_verify_computes_rows_again(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    space = space_of(extracted)
    wrong = stored(space)
    wrong[17] *= 1.01
    rewrite(space, wrong)
    assert run("cache", "verify", "--sample", 0).code == 0
    done = run("cache", "verify", "--all", "--json")
    (finding,) = done.envelope["data"]["findings"]
    assert done.code == 4
    assert "9.9e-03 of its norm" in finding["detail"]
    assert "elsewhere" not in finding["detail"]
    assert space.view().keys[17].tobytes().hex()[:12] in finding["detail"]


def test_a_false_row_made_elsewhere_says_where(run: Run, extracted: dict[str, Any]) -> None:
    space = space_of(extracted)
    rewrite(space, stored(space)[::-1].copy())
    meta = space.meta
    assert meta is not None
    write_meta(space.folder, replace(meta, environments=({**meta.environments[0], "torch": "2.6.0"},)))
    done = run("cache", "verify", "--json")
    assert done.code == 4
    assert "computed in another environment: torch: 2.6.0 -> " in kinds(done)["damage"]


def test_half_precision_is_given_more_room(run: Run, photos: Path) -> None:
    record = run("extract", photos, *TINY, "--precision", "bf16", "--json").data
    space = space_of(record)
    right = stored(space)
    noise = np.random.default_rng(0).normal(size=right.shape)
    noise *= np.linalg.norm(right, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    for share, code in ((5e-3, 0), (3e-2, 4)):
        rewrite(space, (right + share * noise).astype(np.float32))
        assert run("cache", "verify", "--all").code == code


def test_a_difference_within_the_tolerance_is_told_and_no_damage(run: Run, extracted: dict[str, Any]) -> None:
    space = space_of(extracted)
    rewrite(space, stored(space) * np.float32(1.0001))
    done = run("cache", "verify", "--all", "--json")
    assert done.code == 0
    assert done.data["spaces"][0]["max_relative_difference"] == pytest.approx(1e-4, rel=0.01)


def test_image_files_that_moved_on_are_no_damage(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    write_photo(photos / "red" / "000.png", COLOURS["blue"], 5)
    (photos / "red" / "001.png").unlink()
    done = run("cache", "verify", "--all", "--json")
    assert (done.code, done.data["files"], set(kinds(done))) == (0, 34, {"changed", "unreadable"})
    assert done.data["spaces"][0]["recomputed"] == 34


def test_orphaned_and_missing_rows_are_told(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    (photos / "red" / "000.png").unlink()
    write_photo(photos / "red" / "new.png", COLOURS["red"], 77)
    run("extract", photos, *TINY, "--seed", 1)
    done = run("cache", "verify", "--json")
    assert done.code == 0
    assert kinds(done)["orphaned"].startswith("1 rows")
    assert kinds(done)["missing"].startswith("1 images of photos-")


def test_a_backbone_that_is_another_now_proves_nothing(run: Run, photos: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    options = ["--backbone", "timm:test_resnet", "--weights", "w.safetensors"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet").state_dict(), "w.safetensors")
        if seed == 0:
            run("extract", photos, *options)
    done = run("cache", "verify", "--json")
    assert done.code == 0
    assert re.search("weights: [0-9a-f]{12} -> [0-9a-f]{12}$", kinds(done)["unproved"])


def two_spaces(run: Run, photos: Path, extracted: dict[str, Any]) -> tuple[Space, Space]:
    """The space of `extracted`, used 40 days ago, and one of another seed, used 10 days ago."""
    old, new = space_of(extracted), space_of(run("extract", photos, *TINY, "--seed", 1, "--json").data)
    day = 86400
    for space, days in ((old, 40), (new, 10)):
        then = (CACHE / "latest.json").stat().st_mtime - days * day
        os.utime(space.folder / "meta.json", (then, then))
    return old, new


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--older-than", "30d"], [0]),
        (["--older-than", "1w"], [0, 1]),
        (["--older-than", "60d"], []),
        (["--max-size", "45KB"], [0]),
        (["--max-size", "1KB"], [0, 1]),
        (["--max-size", "10GB"], []),
        (["--unused"], []),
    ],
)
def test_gc(run: Run, photos: Path, extracted: dict[str, Any], options: list[str], gone: list[int]) -> None:
    spaces = two_spaces(run, photos, extracted)
    names = [spaces[k].folder.name for k in gone]
    before = run("cache", "ls", "--json").data["bytes"]
    planned = run("cache", "gc", *options, "--dry-run", "--json").data
    assert [one["name"] for one in planned["removed"]] == names
    assert len(Cache(CACHE).spaces()) == 2
    done = run("cache", "gc", *options, "--json").data
    assert {**done, "dry_run": True} == planned
    after = run("cache", "ls", "--json").data
    assert [one["space"] for one in after["spaces"]] == sorted({s.folder.name for s in spaces} - set(names))
    assert done["left_bytes"] == before - done["freed_bytes"]
    assert run("cache", "verify", "--sample", 0).code == 0


def test_gc_of_the_unused(run: Run, tmp_path: Path, extracted: dict[str, Any]) -> None:
    other = run("extract", write_photos(tmp_path / "other", 3, ("red",)), *TINY, "--seed", 1, "--json").data
    for name in ("old", "young"):
        (CACHE / "datasets" / f".tmp-{name}").write_bytes(b"1234")
    os.utime(CACHE / "datasets" / ".tmp-old", (1, 1))
    run("cache", "rm", other["dataset"])
    removed = run("cache", "gc", "--unused", "--json").data["removed"]
    assert [one["name"] for one in removed] == [".tmp-old", Path(other["space"]).name]
    assert [path.name for path in (CACHE / "datasets").glob(".tmp-*")] == [".tmp-young"]
    assert len(Cache(CACHE).spaces()) == 1


def test_gc_takes_graphs_first_and_they_are_made_again(run: Run, photos: Path) -> None:
    openvino = [*TINY, "--executor", "openvino"]
    first = run("extract", photos, *openvino, "--json").data
    graphs = set(Path("cache/graphs").iterdir())
    assert len(graphs) == 2  # the graph, and what it cost
    size = sum(path.stat().st_size for path in Path("cache").rglob("*") if path.is_file())
    gone = run("cache", "gc", "--max-size", f"{size - 1000}B", "--dry-run", "--json").data
    assert {one["name"] for one in gone["removed"]} <= {path.name for path in graphs}
    assert set(Path("cache/graphs").iterdir()) == graphs
    run("cache", "gc", "--unused")
    assert not list(Path("cache/graphs").iterdir())
    assert Path(first["features"]).exists()
    run("cache", "rm", Path(first["space"]).name)
    again = run("extract", photos, *openvino, "--json").data
    assert again["executor"] == "openvino"


def test_gc_does_not_guess_what_a_damaged_table_names(run: Run, extracted: dict[str, Any]) -> None:
    flip(Cache(CACHE).table_path(extracted["dataset"]), 700)
    assert run("cache", "gc", "--unused").code == 4
    assert len(Cache(CACHE).spaces()) == 1


def test_gc_leaves_a_space_that_is_being_written(run: Run, extracted: dict[str, Any]) -> None:
    space = space_of(extracted)
    with space.writer(feature_dim=96, dtype="float32", environment={}, pins={}):
        done = run("cache", "gc", "--max-size", "0", "--json").data
        assert (done["removed"], done["freed_bytes"]) == ([], 0)
        assert f"process {os.getpid()}" in done["skipped"][0]["reason"]
        assert run("cache", "rm", space.folder.name).code == 75
    assert len(space.view()) == 36


@pytest.mark.parametrize("text", ["much", "10 XB", "-1GB", ""])
def test_gc_refuses_what_is_no_size(run: Run, extracted: dict[str, Any], text: str) -> None:
    done = run("cache", "gc", "--max-size", text)
    assert (done.code, "--max-size" in done.line) == (2, True)
    assert len(Cache(CACHE).spaces()) == 1


def test_use_keeps_a_space(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    meta = space_of(extracted).folder / "meta.json"
    name = run("fit-head", "--l2", 0.1, "--json").data["run"]
    for words in (
        ["fit-head", "--l2", 0.1],
        ["predict", name, photos],
        ["extract", photos, *TINY],
        ["cache", "export"],
    ):
        os.utime(meta, (1, 1))
        run(*words)
        assert run("cache", "gc", "--older-than", "1d", "--dry-run", "--json").data["removed"] == []


def test_a_cache_that_can_only_be_read(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    mount = f"mount --bind {CACHE} {CACHE} && mount -o remount,ro,bind {CACHE}"
    try:
        subprocess.run(["unshare", "-m", "sh", "-c", mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a folder read-only")
    python = f"{sys.executable} -m embedpipe"
    steps = [f"! touch {CACHE}/x", *(f"{python} {x}" for x in ("cache ls", "cache verify", "cache export", "fit-head"))]
    told = subprocess.run(
        ["unshare", "-m", "sh", "-c", " && ".join([mount, *steps])], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    refused = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {python} cache gc --max-size 0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "not removed: could not lock" in refused.stdout
    assert len(Cache(CACHE).spaces()) == 1


@pytest.mark.parametrize("format", ["h5", "npy", "parquet"])
def test_export_without_labels(run: Run, photos: Path, format: str) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    run("extract", photos / "red", *TINY)
    done = run("cache", "export", "--format", format, "--json").data
    assert done["rows"] == 12
    if format == "h5":
        with h5py.File(done["path"]) as file:
            assert set(file["labels"][:]) == {-1}
            assert file["classes"].shape == (0,)


def test_rm(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    assert run("cache", "rm", "timm-test", "nothing").code == 2
    assert len(Cache(CACHE).spaces()) == 1
    flip(space_of(extracted).folder / "meta.json", 40)
    run("cache", "rm", "timm-test")
    assert (Cache(CACHE).spaces(), run("cache", "verify").code) == ([], 0)
    assert run("extract", photos, *TINY, "--json").data["computed"] == 36
    done = run("cache", "rm", photos, "--json").data
    assert [one["name"] for one in done["removed"]] == [extracted["dataset"]]
    assert (Cache(CACHE).datasets(), Cache(CACHE).latest()) == ([], None)
    assert "extract" in run("fit-head").line


@pytest.fixture
def odd(run: Run, photos: Path) -> dict[bytes, bytes]:
    """Path to label of extracted photos, one with a name that is not UTF-8, one with a copy and a backslash."""
    folder = os.fsencode(photos / "red")
    whole = (photos / "red" / "001.png").read_bytes()
    Path(os.fsdecode(folder + b"/caf\xe9.png")).write_bytes(whole + b" ")
    Path(os.fsdecode(folder + b"/back\\xe9.png")).write_bytes(whole)
    run("extract", photos, *TINY)
    return {os.fsencode(path): path.parent.name.encode() for path in photos.rglob("*.png")}


def check(odd: dict[bytes, bytes], found: dict[str, Any], paths: list[bytes], labels: list[bytes]) -> None:
    """The rows are those of the space, path by path, with the label and split of the sample table."""
    cache = Cache(CACHE)
    manifest, view = cache.read_dataset(), cache.spaces()[0].view()
    samples = {os.fsencode(manifest.display_name(sample)): sample for sample in manifest.samples}
    assert dict(zip(paths, labels, strict=True)) == odd
    assert len(paths) == 38
    assert list(found["splits"]) == [samples[path].split.encode() for path in paths]
    assert [bytes(key) for key in found["keys"]] == [samples[path].key for path in paths]
    assert (np.array(list(found["features"])) == view.read(samples[path].key for path in paths)).all()


def test_export_h5_is_read_by_h5py_alone(run: Run, odd: dict[bytes, bytes]) -> None:
    done = run("cache", "export", "--format", "h5", "--out", "far/away.h5", "--json").data
    assert (done["rows"], done["feature_dim"], done["path"]) == (38, 96, "far/away.h5")
    with h5py.File("far/away.h5") as file:
        found = {name: file[name][:] for name in file}
        assert json.loads(file.attrs["spec"])["architecture"] == "test_resnet"
    assert found["features"].dtype == np.float32
    check(odd, found, found["paths"].tolist(), found["classes"][found["labels"]].tolist())


def test_export_npz_needs_no_pickle(run: Run, odd: dict[bytes, bytes]) -> None:
    path = run("cache", "export", "--format", "npy", "--json").data["path"]
    with np.load(path, allow_pickle=False) as file:
        found = dict(file)
    assert json.loads(found["about"].item())["dataset"] == Path(path).stem
    check(odd, found, found["paths"].tolist(), found["classes"][found["labels"]].tolist())


def test_export_parquet_keeps_names_that_are_not_utf8(run: Run, odd: dict[bytes, bytes]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    run("cache", "export", "--format", "parquet", "--out", "x.parquet")
    found = parquet.read_table("x.parquet").to_pydict()

    def unescaped(text: str) -> bytes:
        return re.sub(
            rb"\\(\\|x[0-9a-f]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1][1:], 16)]), text.encode()
        )

    found["splits"] = [split.encode() for split in found["splits"]]
    check(odd, found, list(map(unescaped, found["paths"])), list(map(unescaped, found["label_names"])))


def test_export_parquet_without_pyarrow_says_what_to_install(
    run: Run, extracted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = run("cache", "export", "--format", "parquet", "--out", "x.parquet")
    assert (done.code, "embedpipe[parquet]" in done.line, Path("x.parquet").exists()) == (2, True, False)


def test_export_holds_one_chunk_of_rows_at_a_time(run: Run, extracted: dict[str, Any]) -> None:
    manifest, space = Cache(CACHE).read_dataset(), space_of(extracted)
    exported = Exported(manifest, manifest.samples, space.view(), chunk_bytes=96 * 4 * 7)
    assert [len(chunk) for chunk in exported.chunks()] == [7, 7, 7, 7, 7, 1]
    out = io.BytesIO()
    export_writer("h5", exported, {})(out)
    with h5py.File(out) as file:
        assert (file["features"][:] == space.view().read(exported.keys)).all()


def test_export_names_its_space(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    run("extract", photos, *TINY, "--layer", "layer2")
    for flags in (["--layer", "layer2"], ["--space", Path(extracted["space"]).name]):
        assert run("cache", "export", *flags, "--json").data["space"].startswith("timm-test_resnet-")
    assert run("cache", "export", "--layer", "layer9").code == 2
    Path("file").touch()
    assert run("cache", "export", "--layer", "layer2", "--out", "file/x.h5").code == 74


def test_the_python_twins(run: Run, photos: Path, extracted: dict[str, Any]) -> None:
    assert caretaking.list_cache(cache_dir="cache").spaces[0].rows == 36
    assert not proving.verify_cache(cache_dir="cache", sample=1).damaged
    why = proving.explain_reuse(str(photos), "timm:test_resnet", weights="none", image_size=96)
    assert [str(one) for one in why.differing] == [
        "transform.crop_size: [160, 160] -> [96, 96]",
        "transform.resize_size: 168 -> 101",
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_carries_an_example(run: Run, verb: str) -> None:
    assert f"embedpipe cache {verb}" in run("cache", verb, "--help").out.partition("Example:")[2]


def test_an_unknown_subcommand_names_the_nearest(run: Run) -> None:
    done = run("cache", "verfy", "--json")
    assert (done.code, done.envelope["command"]) == (2, "cache")
    assert "did you mean verify?" in done.line
    assert run("cache", "verify", "--sampel", 3, "--json").envelope["command"] == "cache verify"


def test_config_and_environment_reach_a_subcommand(
    run: Run, photos: Path, extracted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_spaces(run, photos, extracted)
    CACHE.rename("elsewhere")
    Path("c.yaml").write_text("cache_dir: elsewhere\ncache gc:\n  older-than: 30d\n  dry_run: true\n")
    orders = [
        ["--config", "c.yaml", "cache", "gc"],
        ["cache", "gc", "--config", "c.yaml"],
        ["cache", "--config", "c.yaml", "gc"],
    ]
    for order in orders:
        assert len(run(*order, "--json").data["removed"]) == 1
    monkeypatch.setenv("EMBEDPIPE_CACHE_GC_OLDER_THAN", "1d")
    assert len(run(*orders[0], "--json").data["removed"]) == 2
    assert len(run(*orders[0], "--older-than", "90d", "--json").data["removed"]) == 0
    for text, near in (("cache gcc:\n  unused: true\n", "cache gc"), ("cache gc:\n  max-syze: 1\n", "max_size")):
        Path("c.yaml").write_text(text)
        done = run("cache", "gc", "--config", "c.yaml")
        assert (done.code, near in done.line) == (2, True)
    for order in (["--cache-dir", "elsewhere", "cache", "ls"], ["cache", "--cache-dir", "elsewhere", "ls", "--json"]):
        assert "timm-test_resnet" in run(*order).out

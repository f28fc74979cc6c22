"""One image has one row, wherever it lies: folders, tars, Parquet files and URLs through the command line."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.conftest import TINY, Run, write_photos
from tests.data.serving import serving


def pack(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as stream:
        for name in sorted(os.listdir(folder)):
            stream.add(folder / name, arcname=name)
    return tar


def pack_parquet(folder: Path, path: Path) -> Path:
    files = sorted(folder.rglob("*.png"))
    names = [file.parent.name for file in files]
    parquet.write_table(
        pa.table({"image": [file.read_bytes() for file in files], "label": names}), path, row_group_size=7
    )
    return path


@pytest.fixture
def sources(photos: Path, tmp_path: Path) -> dict[str, str]:
    """The photos, packed otherwise."""
    os.mkdir(tmp_path / "packed")
    found = {
        "tar": pack(photos, tmp_path / "packed/p.tar"),
        "parquet": pack_parquet(photos, tmp_path / "packed/p.parquet"),
    }
    system = fsspec.filesystem("memory")
    system.pipe({f"/photos/{file.relative_to(photos)}": file.read_bytes() for file in photos.rglob("*.png")})
    return {"folder": str(photos), **{kind: str(path) for kind, path in found.items()}, "url": "memory://photos"}


@pytest.mark.parametrize("first", ["folder", "tar", "parquet", "url"])
def test_the_same_image_is_computed_once(run: Run, sources: dict[str, str], first: str) -> None:
    found = run("extract", sources[first], *TINY, "--json").data
    assert (found["computed"], found["failed"]) == (36, [])
    for other in sources.values():
        again = run("extract", other, *TINY, "--json").data
        assert (again["computed"], again["reused"], again["splits"]) == (0, 36, found["splits"])
        assert again["classes"] == found["classes"]


@pytest.mark.parametrize("kind", ["tar", "parquet", "url"])
def test_all_verbs_work_on_them(run: Run, sources: dict[str, str], kind: str) -> None:
    run("extract", sources[kind], *TINY)
    fitted = run("fit-head", "--json").data
    assert len(fitted["classes"]) == 3
    assert run("evaluate", fitted["run"], "--json").code == 0
    assert run("evaluate", fitted["run"], sources[kind], "--json").data["metrics"]["n"] == 36
    proved = run("cache", "verify", "--json")
    assert proved.code == 0
    assert "36 image files have the bytes" in run("cache", "verify").out
    assert "36 hits" in run("cache", "why", sources[kind], *TINY).out
    assert run("finetune", "--unfreeze", "none", "--epochs", "1", "--json").code == 0
    predicted = run("predict", fitted["run"], sources["folder"], "--json").data
    assert len(predicted["predictions"]) == 36


def test_failures_name_the_member(run: Run, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", per_class=4)
    (photos / "red/bad.png").write_bytes(b"no image")
    tar, table = pack(photos, tmp_path / "p.tar"), pack_parquet(photos, tmp_path / "p.parquet")
    for data, name in ((tar, "red/bad.png"), (table, "row 1:5 image")):
        ended = run("extract", data, *TINY, "--json")
        assert ended.code == 3
        assert [one["path"] for one in ended.data["failed"]] == [f"{data}/{name}"]
        assert ended.data["failed"][0]["stage"] == "decode"


def test_a_cut_tar_ends_with_3_and_says_so(run: Run, photos: Path, tmp_path: Path) -> None:
    tar = pack(photos, tmp_path / "p.tar")
    os.truncate(tar, tar.stat().st_size // 2)
    ended = run("extract", tar, *TINY, "--json")
    assert ended.code == 3
    (failed,) = ended.data["failed"]
    assert "whole members before are used" in failed["reason"]
    assert 0 < ended.data["computed"] < 36
    compressed = tmp_path / "p.tar.gz"
    compressed.write_bytes(b"\x1f\x8b")
    ended = run("extract", compressed, *TINY)
    assert ended.code == 2
    assert "is compressed, expected an uncompressed .tar" in ended.line


def test_an_interrupted_extraction_of_a_tar_goes_on(run: Run, photos: Path, tmp_path: Path) -> None:
    tar = pack(photos, tmp_path / "p.tar")
    assert run("extract", tar, *TINY, "--limit", "10", "--json").data["computed"] == 10
    again = run("extract", tar, *TINY, "--json").data
    assert (again["computed"], again["reused"]) == (26, 10)


def test_a_member_that_has_changed_is_found(run: Run, photos: Path, tmp_path: Path) -> None:
    tar = pack(photos, tmp_path / "p.tar")
    run("extract", tar, *TINY)
    data = bytearray(tar.read_bytes())
    place = data.index((photos / "red/003.png").read_bytes())
    data[place + 100] ^= 1
    tar.write_bytes(data)
    ended = run("cache", "verify", "--json")
    findings = json.dumps(ended.data)
    assert "changed" in findings
    assert "red/003.png" in findings


def test_the_web_is_read_in_ranges(run: Run, photos: Path, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "web")
    pack(photos, tmp_path / "web/p.tar")
    with serving(tmp_path / "web") as (url, asked):
        assert run("extract", f"{url}/p.tar", *TINY, "--json").data["computed"] == 36
        asked.clear()
        assert run("extract", f"{url}/p.tar", *TINY, "--json").data["reused"] == 36
        sizes = [len(body) for method, _, body in asked if method == "GET"]
        assert len(sizes) <= 2  # its headers; no image again

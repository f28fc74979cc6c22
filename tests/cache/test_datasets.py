"""Sample tables come back as the manifests they were, whatever the names of the files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from embedpipe.cache import Cache, dataset_name
from embedpipe.data import ByteSource, Manifest, Sample, Source
from embedpipe.errors import CacheMismatch, UsageError


def manifest(folder: Path, name: str = "data") -> Manifest:
    odd = os.fsdecode(b"a/\xff\n.png")
    return Manifest(
        name=name,
        sources=(Source(str(folder / name), folder / name), Source("rel/ative.csv", folder)),
        samples=(
            Sample("a/1.png", "größe", "train", "patient 1", bytes(32), 0),
            Sample(odd, None, "val", None, bytes(range(32)), 1),
        ),
        classes=("größe", "z"),
        ignored=3,
        unreadable=(),
        warnings=("one class only",),
    )


def test_a_table_gives_the_manifest_back(cache: Cache, tmp_path: Path) -> None:
    stored = manifest(tmp_path)
    name = cache.write_dataset(stored)
    assert cache.read_dataset(name) == stored
    empty = Manifest("empty", (Source("e", tmp_path),), (), (), 0, (), ())
    assert cache.read_dataset(cache.write_dataset(empty)) == empty


def test_parts_of_files_come_back_and_tables_without_have_no_column(cache: Cache, tmp_path: Path) -> None:
    plain = manifest(tmp_path)
    with h5py.File(cache.table_path(cache.write_dataset(plain))) as file:
        assert set(file) == {"path", "label", "split", "group", "key", "source", "classes", "warnings", "sources"}
    part = "1536+20480/" + os.fsdecode(b"a/\xff\n.png")
    odd = replace(plain.samples[0], path="x.tar", part=part)
    sources = (Source("s3://b/x-{0..1}.tar", "s3://b"), Source("hf:o/n:c@train", "hf:o/n:c"), *plain.sources)
    stored = replace(plain, samples=(odd, *plain.samples), sources=sources)
    assert cache.read_dataset(cache.write_dataset(stored)) == stored
    assert stored.byte_source_of(odd) == ByteSource("s3://b/x.tar", part)
    assert stored.display_name(odd) == "s3://b/x.tar/" + part.partition("/")[2]
    assert [one.absolute for one in sources[:2]] == ["s3://b/x-{0..1}.tar", "hf:o/n:c@train"]


def test_a_table_is_found_by_name_id_source_or_prefix(cache: Cache, tmp_path: Path) -> None:
    stored = manifest(tmp_path)
    name = cache.write_dataset(stored)
    cache.write_dataset(manifest(tmp_path, "other"))
    texts = [name, name.rpartition("-")[2], str(tmp_path / "data"), f"{tmp_path}/data/", "dat"]
    for text in texts:
        assert cache.read_dataset(text) == stored
    with pytest.raises(UsageError, match="no data set 'dada'"):
        cache.read_dataset("dada")


def test_a_data_set_keeps_its_name_in_another_folder(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = (Source("data", tmp_path / "data"), Source("lists/a.csv", tmp_path / "lists"))
    name = cache.write_dataset(Manifest("data", sources, (), (), 0, (), ()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert dataset_name(cache.read_dataset(name)) == name
    for place in ("data", "lists/a.csv"):
        assert cache.find_dataset(str(tmp_path / place)) == cache.find_dataset(f"../{place}") == name


def test_the_same_sources_replace_their_table(cache: Cache, tmp_path: Path) -> None:
    first, second = manifest(tmp_path), manifest(tmp_path)
    assert cache.write_dataset(first) == cache.write_dataset(second)
    assert len(cache.datasets()) == 1


def test_the_latest_is_read_by_default(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="extract DATA"):
        cache.read_dataset()
    stored = manifest(tmp_path, "other")
    cache.write_dataset(manifest(tmp_path))
    cache.set_latest(cache.write_dataset(stored), ["timm-x-0123"])
    assert cache.read_dataset() == stored
    assert (cache.latest() or {})["spaces"] == ["timm-x-0123"]
    (cache.root / "latest.json").write_bytes(b"{")
    with pytest.raises(CacheMismatch):
        cache.latest()


def test_names_stay_inside_the_folder(cache: Cache, tmp_path: Path) -> None:
    name = cache.write_dataset(manifest(tmp_path, "../../ev/il"))
    assert [path.stem for path in (cache.root / "datasets").iterdir()] == [name]

"""hf:NAME, with data sets saved on this machine; the Hub is not asked."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from embedpipe.cache import Cache, KeyIndex
from embedpipe.data import read_manifest
from embedpipe.errors import UsageError
from tests.conftest import write_photos


def test_without_the_library_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"'hf:beans' needs datasets; pip install 'embedpipe\[hf\]'"):
        read_manifest(["hf:beans"], key_of=lambda place: place.read())


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that save_to_disk wrote: 6 images in train, 3 in test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets: Any = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    files = sorted(write_photos(tmp_path / "photos", per_class=3).rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "green", "red"])})
    rows = {"image": cells, "label": [0, 0, 0, 1, 1, 1, 2, 2, -1]}
    whole = datasets.Dataset.from_dict(rows, features=kinds)
    splits = {"train": whole.select([0, 1, 3, 4, 6, 8]), "test": whole.select([2, 5, 7])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_data_sets(saved: Path, tmp_path: Path) -> None:
    index = KeyIndex(tmp_path / "memo.sqlite")
    manifest = read_manifest([f"hf:{saved}"], key_of=index.key_of)
    assert (manifest.splits, manifest.classes) == ({"train": 3, "val": 2, "test": 3}, ("blue", "green", "red"))
    assert any("1 image(s)" in text for text in manifest.warnings)  # the label -1
    photo = (tmp_path / "photos/blue/000.png").read_bytes()
    assert manifest.samples[0].key == hashlib.sha256(photo).digest()
    assert manifest.display_name(manifest.samples[0]) == f"hf:{saved}/train/row 0 image"
    cache = Cache(tmp_path / "cache")
    assert cache.read_dataset(cache.write_dataset(manifest)) == manifest
    index.close()
    index = KeyIndex(tmp_path / "memo.sqlite")
    assert read_manifest([f"hf:{saved}@test"], key_of=index.key_of).splits == {"test": 3}
    assert index.hashed == 0
    index.close()
    with pytest.raises(UsageError, match=r"no split 'tset', expected train or test"):
        read_manifest([f"hf:{saved}@tset"], key_of=index.key_of)


def test_what_the_hub_has_not_is_told_in_a_line(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"hf:nobody/nothing: .*; expected hf:NAME") as caught:
        read_manifest(["hf:nobody/nothing"], key_of=lambda place: place.read())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["labels", "target"])
def test_several_labels_and_numbers(saved: Path, tmp_path: Path, column: str) -> None:
    datasets: Any = pytest.importorskip("datasets")
    cells = [{"bytes": b"%d" % n, "path": None} for n in range(4)]
    kind, values = datasets.Value("float32"), [0.5, 1.5, -2.0, 3.0]
    if column == "labels":
        kind, values = datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"])), [[1, 0], [], [1], [0]]
    kinds = datasets.Features({"image": datasets.Image(), column: kind})
    datasets.Dataset.from_dict({"image": cells, column: values}, features=kinds).save_to_disk(tmp_path / "other")
    manifest = read_manifest([f"hf:{tmp_path / 'other'}"], key_of=lambda place: place.read() * 32)
    labels = [sample.label for sample in manifest.samples]
    assert manifest.task == {"labels": "multilabel", "target": "regression"}[column]
    assert labels == (["cat|dog", "|", "dog", "cat"] if column == "labels" else ["0.5", "1.5", "-2.0", "3.0"])

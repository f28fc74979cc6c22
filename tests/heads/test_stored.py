from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedpipe.errors import ModelMismatch, StorageError, UsageError
from embedpipe.heads import KnnHead, LinearHead, fit_knn, fit_linear, load_head

CLASSES = ("cat", "\udcff-not-utf-8", "zebra é")
X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
Y = np.arange(30) % 3


def heads() -> list[LinearHead | KnnHead]:
    return [fit_linear(X, Y, classes=CLASSES, l2=0.1), fit_knn(X, Y, classes=CLASSES, k=3)]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_loaded_head_is_the_saved_one(kind: int, tmp_path: Path) -> None:
    head = heads()[kind]
    head.save(tmp_path / "run")
    loaded = load_head(tmp_path / "run")
    assert type(loaded) is type(head)
    assert loaded.classes == CLASSES
    assert loaded.provenance == head.provenance
    assert np.array_equal(loaded.logits(X), head.logits(X))
    assert np.array_equal(loaded.predict_proba(X), head.predict_proba(X))


def test_a_temperature_may_be_a_whole_number(tmp_path: Path) -> None:
    head = fit_knn(X, Y, classes=CLASSES, temperature=1)
    head.save(tmp_path)
    assert np.array_equal(load_head(tmp_path).logits(X), head.logits(X))


def test_files_are_read_with_numpy_and_json_alone(tmp_path: Path) -> None:
    head = heads()[0]
    head.save(tmp_path)
    arrays, record = (load_file(tmp_path / "head.safetensors"), json.loads((tmp_path / "head.json").read_text()))
    assert record["kind"] == "linear"
    assert record["classes"] == list(CLASSES)
    assert arrays["weight"].dtype == arrays["bias"].dtype == np.float32
    np.testing.assert_allclose(X @ arrays["weight"].T + arrays["bias"], head.logits(X), atol=1e-5)


def test_the_same_head_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        heads()[0].save(tmp_path / name)
    for file in ("head.safetensors", "head.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_arrays_of_another_head_are_refused(tmp_path: Path) -> None:
    linear = heads()[0]
    linear.save(tmp_path)
    save_file({"weight": linear.logits(X)[:3].astype(np.float32), "bias": Y[:3]}, tmp_path / "head.safetensors")
    with pytest.raises(ModelMismatch, match=r"not what head\.json describes"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("head.json", b"{"),
        ("head.json", b"[]"),
        ("head.json", b"\xff\xfe"),
        ("head.json", b'{"format_version": 2, "kind": "linear"}'),
        ("head.json", b'{"format_version": 1, "kind": "tree"}'),
        ("head.safetensors", b""),
        ("head.safetensors", b"\xff" * 64),
    ],
)
def test_damaged_files_are_refused(file: str, content: bytes, tmp_path: Path) -> None:
    heads()[0].save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelMismatch):
        load_head(tmp_path)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "change",
    [{"classes": None}, {"classes": "abc"}, {"provenance": []}, {"feature_dim": "x"}, {"kind": "other"}, {"k": "3"}],
)
def test_records_that_do_not_describe_the_arrays_are_refused(
    change: dict[str, object], kind: int, tmp_path: Path
) -> None:
    heads()[kind].save(tmp_path)
    record = json.loads((tmp_path / "head.json").read_text())
    if change == {"kind": "other"}:
        change = {"kind": "linear" if kind else "knn"}
    elif kind == 0 and "k" in change:
        change = {"feature_dim": 5}
    elif kind == 1 and "feature_dim" in change:
        change = {"temperature": None}
    (tmp_path / "head.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(ModelMismatch, match="expected"):
        load_head(tmp_path)


def test_a_head_of_another_kind_and_a_missing_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no head\.json"):
        load_head(tmp_path)
    heads()[1].save(tmp_path)
    with pytest.raises(ModelMismatch, match="knn"):
        LinearHead.load(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no head\.safetensors"):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").mkdir()
    with pytest.raises(StorageError):
        load_head(tmp_path)


@pytest.mark.parametrize("kind", [0, 1])
def test_features_of_another_width_are_refused(kind: int) -> None:
    with pytest.raises(ModelMismatch, match=r"expected \(N, 4\)"):
        heads()[kind].predict_proba(X[:, :3])


@pytest.mark.parametrize("kind", [0, 1])
def test_no_rows_give_no_rows(kind: int) -> None:
    assert heads()[kind].predict_proba(X[:0]).shape == (0, 3)


def test_shapes_must_belong_together() -> None:
    with pytest.raises(ModelMismatch):
        LinearHead(np.ones((3, 2), dtype=np.float32), np.zeros(2, dtype=np.float32), CLASSES)


def test_many_rows_are_the_same_as_few() -> None:
    many = np.tile(X, (300, 1))  # more than one block
    for head in heads():
        np.testing.assert_allclose(head.logits(many)[-30:], head.logits(X), atol=1e-4)

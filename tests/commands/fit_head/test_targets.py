"""Real digits with three labels each, or their value: extract, fit-head, predict and evaluate, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score

from embedpipe.cache import Cache
from embedpipe.data import join_names
from embedpipe.features import open_features
from tests.conftest import Run

DIGITS = 150
LITE0 = ["--backbone", "timm:tf_efficientnet_lite0", "--weights", "packaged", "--image-size", 64, "--batch-size", 8]


def names_of(digit: int) -> list[str]:
    kinds = {"even": digit % 2 == 0, "big": digit >= 5, "round": digit in (0, 6, 8, 9)}
    return [name for name, holds in kinds.items() if holds]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Digits as PNG files beside tables of their names and of their values, with splits."""
    folder, data = tmp_path / "digits", load_digits()
    folder.mkdir()
    rows = []
    for k in range(DIGITS):
        Image.fromarray(np.pad((data.images[k] * (255 / 16)).round().astype(np.uint8), 4)).save(folder / f"{k:03d}.png")
        split = "train" if k < 90 else "val" if k < 120 else "test"
        rows.append({"path": f"{k:03d}.png", "split": split, "digit": int(data.target[k])})
    several = [{"path": row["path"], "split": row["split"], "labels": names_of(row["digit"])} for row in rows]
    (folder / "several.jsonl").write_text("\n".join(map(json.dumps, several)))
    parquet.write_table(pa.Table.from_pylist(several), folder / "several.parquet")
    for name, column in (("several", lambda d: "|".join(names_of(d))), ("value", str)):
        head = {"several": "labels", "value": "target"}[name]
        lines = [f"{row['path']},{row['split']},{column(row['digit'])}" for row in rows]
        (folder / f"{name}.csv").write_text("\n".join([f"path,split,{head}", *lines]))
    return folder


def predictions(run_name: str, split: str) -> list[dict[str, str]]:
    with (Path("runs") / run_name / "predictions.csv").open() as stream:
        return [row for row in csv.DictReader(stream) if row["split"] == split]


def standardised(X: np.ndarray, like: np.ndarray) -> np.ndarray:
    std = like.std(axis=0, dtype=np.float64)
    return (X - like.mean(axis=0, dtype=np.float64)) / np.maximum(std, 0.01 * np.median(std))


def test_several_labels(run: Run, digits: Path) -> None:
    first = run("extract", digits / "several.csv", *LITE0, "--json").data
    assert (first["task"], first["classes"]) == ("multilabel", ["big", "even", "round"])
    fitted = run("fit-head", "--json").data
    assert (fitted["task"], fitted["solver"], fitted["chosen_on"]) == ("multilabel", "newton", "val")
    assert set(fitted["l2_path"][0]) == {"l2", "val_log_loss", "objective"}
    assert fitted["l2"] == min(fitted["l2_path"], key=lambda point: point["val_log_loss"])["l2"]
    assert fitted["calibration"] is None
    assert fitted["leaks"]["accuracy_without_leaks"] == {}

    features = open_features(Cache(Path("cache")))
    X, Y = features.arrays("train")
    X_test, Y_test = features.arrays("test")
    C = 1 / (len(X) * fitted["l2"])
    models = [LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(standardised(X, X), y) for y in Y.T]
    wanted = np.stack([one.predict_proba(standardised(X_test, X))[:, 1] for one in models], axis=1)
    said = run("predict", fitted["run"], *sorted(digits.glob("1[2-4]?.png")), "--probabilities", "--json").data
    found = np.array([list(one["probabilities"].values()) for one in said["predictions"]])
    np.testing.assert_allclose(found, wanted, atol=1e-3)  # as far as newton's bound on the objective goes
    scores = fitted["metrics"]["test"]
    assert scores["mean_average_precision"] == pytest.approx(average_precision_score(Y_test, found))
    assert scores["roc_auc"] == pytest.approx(roc_auc_score(Y_test, found))
    assert scores["macro_f1"] == pytest.approx(f1_score(Y_test, found >= 0.5, average="macro"))
    low, high = scores["mean_average_precision_ci95"]
    assert 0.6 < low < scores["mean_average_precision"] < high
    assert run("evaluate", fitted["run"], "--json").data["metrics"] == scores

    rows = predictions(fitted["run"], "test")
    assert [join_names(row["label"].split("|")) if row["label"] else "|" for row in rows] == [
        sample.label for sample in features.samples("test")
    ]
    assert [row["predicted"] for row in rows] == [one["label"] for one in said["predictions"]]
    assert [one["labels"] for one in said["predictions"]] == [
        [name for name, p in zip(("big", "even", "round"), row, strict=True) if p >= 0.5] for row in found
    ]
    assert {(row["predicted"] == "") == (row["probability"] == "") for row in rows} == {True}
    truth = np.where(Y_test > 0, found, 1 - found).prod(axis=1)
    np.testing.assert_allclose([float(row["probability_of_label"]) for row in rows], truth, rtol=1e-6)
    assert len((Path("runs") / fitted["run"] / "per_class.csv").read_text().splitlines()) == 1 + 3 * 3

    one = next(n for n, row in enumerate(rows) if "|" in row["predicted"])
    printed = next(csv.DictReader(io.StringIO(run("predict", fitted["run"], digits / f"{120 + one}.png").out)))
    assert printed["label"] == rows[one]["predicted"]
    assert float(printed["probability"]) == pytest.approx(found[one][found[one] >= 0.5].min(), abs=1e-6)
    (digits / "several.tsv").write_text((digits / "several.csv").read_text().replace(",", "\t"))
    for kind in ("tsv", "parquet", "jsonl"):
        again = run("extract", digits / f"several.{kind}", *LITE0, "--json").data
        assert (again["computed"], again["task"], again["splits"]) == (0, "multilabel", first["splits"])
        np.testing.assert_array_equal(open_features(Cache(Path("cache"))).arrays("train")[1], Y)
    assert run("fit-head", "--json").data["metrics"] == fitted["metrics"]


def test_copies_are_leaks_whatever_the_task(run: Run, digits: Path) -> None:
    (digits / "120.png").write_bytes((digits / "000.png").read_bytes())
    run("extract", digits / "value.csv", "--backbone", "timm:test_resnet", "--weights", "none")
    ended = run("fit-head", "--json")
    leaks = ended.data["leaks"]
    assert leaks["duplicates_of_train"] == {"val": 0, "test": 1}
    without = leaks["score_without_leaks"]["test"]
    assert (without["n"], leaks["accuracy_without_leaks"]) == (29, {})
    rows = [row for row in predictions(ended.data["run"], "test") if not row["path"].endswith("120.png")]
    truth, said = ([float(row[name]) for row in rows] for name in ("label", "predicted"))
    assert without["r2"] == pytest.approx(r2_score(truth, said))
    told = f"1 of test (r2 without them {without['r2']:.4f})"
    assert any(text.endswith(told) for text in ended.envelope["warnings"])


def test_numbers(run: Run, digits: Path) -> None:
    assert "150 images, numbers" in run("extract", digits / "value.csv", *LITE0).out
    fitted = run("fit-head", "--json").data
    assert (fitted["task"], fitted["solver"], fitted["classes"]) == ("regression", "ridge", ["target"])
    assert set(fitted["l2_path"][0]) == {"l2", "val_rmse", "loo_rmse", "objective"}
    features = open_features(Cache(Path("cache")))
    X, y = features.arrays("train")
    X_test, y_test = features.arrays("test")
    model = Ridge(alpha=fitted["l2"] * len(X)).fit(standardised(X, X), y)
    wanted = model.predict(standardised(X_test, X))
    said = run("predict", fitted["run"], *sorted(digits.glob("1[2-4]?.png")), "--json").data["predictions"]
    np.testing.assert_allclose([one["value"] for one in said], wanted, atol=1e-4)
    scores = fitted["metrics"]["test"]
    assert scores["r2"] == pytest.approx(r2_score(y_test, wanted), abs=1e-4)
    assert scores["r2_ci95"][0] < scores["r2"] < scores["r2_ci95"][1]
    assert run("evaluate", fitted["run"], "--json").data["metrics"] == scores
    rows = predictions(fitted["run"], "test")
    assert [float(row["label"]) for row in rows] == y_test.tolist()
    np.testing.assert_allclose([float(row["predicted"]) for row in rows], wanted, atol=1e-4)
    printed = list(csv.reader(io.StringIO(run("predict", fitted["run"], digits / "120.png").out)))
    assert printed[0] == ["path", "value"]
    assert float(printed[1][1]) == pytest.approx(wanted[0], abs=1e-4)
    assert "predicts a number" in run("predict", fitted["run"], digits / "120.png", "--probabilities").line


@pytest.mark.parametrize("table", ["several.csv", "value.csv"])
def test_what_needs_one_class_an_image_is_refused_in_a_line(run: Run, digits: Path, table: str) -> None:
    small = ["--backbone", "timm:test_resnet", "--weights", "none", "--layer", "layer4", "--layer", "penultimate"]
    run("extract", digits / table, *small)
    layer = ["--layer", "penultimate"]
    for option in (
        ["--class-weight", "balanced"], ["--shots", "1"], ["--folds", "3"], ["--calibrate"],
    ):  # fmt: skip
        ended = run("fit-head", *layer, *option)
        assert (ended.code, option[0] in ended.line) == (2, True)
        assert "needs one class per image" in ended.line
    for command in (["fit-head", "--layer", "all"], ["fit-head", "--compare-layers"], ["audit"]):
        ended = run(*command)
        assert (ended.code, "needs one class per image" in ended.line) == (2, True)
    name = run("fit-head", *layer, "--refit", "--json").data["run"]
    for command, said in (
        (["finetune", "--unfreeze", "none"], "expected one class per image"),
        (["compare", name, name], "expected single labels"),
        (["evaluate", name, "--confusion", "c.csv"], "have no confusion matrix"),
        (["fit-head", *layer, "--solver", "lbfgs"], "the solver lbfgs does not support"),
        (["fit-head", *layer, "--solver", "knn"], "the solver knn does not support"),
        (["evaluate", name, digits / ("value.csv" if table == "several.csv" else "several.csv")], "was fitted on"),
    ):
        ended = run(*command)
        assert (ended.code, said in ended.line) == (2, True), ended.err


def test_numbers_without_val_leave_each_image_out(run: Run, digits: Path) -> None:
    text = (digits / "value.csv").read_text().replace(",val,", ",test,")
    (digits / "no-val.csv").write_text(text)
    run("extract", digits / "no-val.csv", "--val-fraction", 0, "--backbone", "timm:test_resnet", "--weights", "none")
    fitted = run("fit-head", "--json").data
    assert fitted["chosen_on"] is None
    assert fitted["l2"] == min(fitted["l2_path"], key=lambda point: point["loo_rmse"])["l2"]


@pytest.mark.parametrize(("table", "label"), [("several.csv", b"|"), ("value.csv", b"0")])
def test_stored_tables_say_their_task_to_plain_h5py(run: Run, digits: Path, table: str, label: bytes) -> None:
    found = run("extract", digits / table, "--backbone", "timm:test_resnet", "--weights", "none", "--json").data
    cache = Cache(Path("cache"))
    with h5py.File(cache.table_path(found["dataset"])) as file:
        assert file.attrs["task"] == found["task"].encode()
        assert label in file["label"][:]
    manifest = cache.read_dataset(found["dataset"])
    assert (manifest.task, list(manifest.classes)) == (found["task"], found["classes"])
    for format in ("h5", "npy", "parquet"):
        assert run("cache", "export", "--format", format, "--out", f"x.{format}").code == 0
    with h5py.File("x.h5") as file:
        assert file["labels"].shape == ((DIGITS, 3) if table == "several.csv" else (DIGITS,))


@pytest.mark.parametrize(
    ("table", "words"), [("several.csv", "sigmoid of each logit"), ("value.csv", "none: the logit is the number")]
)
def test_an_export_says_what_its_logits_mean(run: Run, digits: Path, table: str, words: str) -> None:
    run("extract", digits / table, "--backbone", "timm:test_resnet", "--weights", "none")
    fitted = run("fit-head", "--json").data
    run("export", fitted["run"], "--format", "timm", "--output", "out")
    said = json.loads(Path("out/preprocessing.json").read_text())
    assert said["task"] == fitted["task"]
    assert said["probabilities"].startswith(words)

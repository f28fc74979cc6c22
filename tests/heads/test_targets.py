"""Heads of several labels an image, and of numbers: what scikit-learn finds for the same objective."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score

from embedpipe.errors import ModelMismatch, UsageError
from embedpipe.evaluation import score_multilabel, score_regression
from embedpipe.heads import ChunkedFeatures, LinearHead, fit_linear, fit_path, load_head

N, D = 200, 30
NAMES = ("even", "big", "round")


def features(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X (N, D), three labels (N, 3) and a number (N,) that hang on it."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(N, D)) * np.geomspace(0.1, 100, D) + 3
    Z = (X - 3) / np.geomspace(0.1, 100, D)
    W = np.random.default_rng(9).normal(size=(D, 3))
    Y = (Z @ W + random.normal(size=(N, 3)) > 0).astype(np.float32)
    return X.astype(np.float32), Y, 5 + 100 * (Z @ W[:, 0]) + 80 * random.normal(size=N)


def standardised(X: np.ndarray) -> np.ndarray:
    X = X.astype(np.float64)
    return (X - X.mean(axis=0)) / X.std(axis=0)


@pytest.mark.parametrize("l2", [1e-3, 1e-2])
def test_labels_are_as_scikit_learn_fits_one_against_the_rest(l2: float) -> None:
    X, Y, _ = features()
    head = fit_linear(X, Y, classes=NAMES, l2=l2, task="multilabel")
    assert (head.task, head.provenance["solver"]) == ("multilabel", "newton")
    model = [LogisticRegression(C=1 / (N * l2), tol=1e-8, max_iter=10_000).fit(standardised(X), y) for y in Y.T]
    wanted = np.stack([one.predict_proba(standardised(X))[:, 1] for one in model], axis=1)
    np.testing.assert_allclose(head.predict_proba(X), wanted, atol=1e-4)
    found = score_multilabel(head.predict_proba(X), Y)["mean_average_precision"]
    assert found == pytest.approx(average_precision_score(Y, wanted), abs=1e-3)


def test_the_least_log_loss_on_val_chooses_l2_of_labels() -> None:
    X, Y, _ = features()
    X_val, Y_val, _ = features(1)
    path = fit_path(X, Y, X_val, Y_val, classes=NAMES, task="multilabel")
    losses = {point["l2"]: point["val_log_loss"] for point in path.points}
    assert path.l2 == min(losses, key=lambda l2: losses[l2] or 0)
    assert 1e-6 < path.l2 < 1e2
    assert losses[path.l2] == pytest.approx(score_multilabel(path.head.predict_proba(X_val), Y_val)["log_loss"])


def test_labels_that_all_or_none_have_are_answered_so() -> None:
    X, Y, _ = features()
    Y = np.insert(Y, [0, 3], [[1, 0]], axis=1)
    head = fit_linear(X, Y, classes=("always", *NAMES, "never"), l2=0.01, task="multilabel")
    p = head.predict_proba(X)
    assert p[:, 0].min() > 1 - 1e-8
    assert p[:, 4].max() < 1e-8
    np.testing.assert_allclose(
        p[:, 1:4], fit_linear(X, Y[:, 1:4], classes=NAMES, l2=0.01, task="multilabel").predict_proba(X), atol=1e-6
    )
    with pytest.raises(UsageError, match="labels that some training images have and others lack: 0"):
        fit_linear(X, Y[:, [0]], classes=("always",), l2=0.01, task="multilabel")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_numbers_are_as_ridge_of_scikit_learn_fits_them(l2: float, weighted: bool) -> None:
    X, _, y = features()
    y = y + 1e9  # seconds since 1970, say
    weight = np.random.default_rng(2).uniform(0.5, 2, N) if weighted else np.ones(N)
    head = fit_linear(X, y, classes=("target",), l2=l2, task="regression", sample_weight=weight if weighted else None)
    assert head.provenance["solver"] == "ridge"
    model = Ridge(alpha=l2).fit(standardised(X), y - 1e9, sample_weight=weight / weight.sum())
    wanted = model.predict(standardised(X))
    found = head.predict_proba(X)[:, 0] - 1e9
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert score_regression(found, y - 1e9)["r2"] == pytest.approx(r2_score(y - 1e9, wanted), abs=1e-6)


def test_l2_of_numbers_is_chosen_on_val_or_by_leaving_each_out() -> None:
    X, _, y = features()
    X_val, _, y_val = features(1)
    path = fit_path(X, y, X_val, y_val, classes=("target",), task="regression")
    errors = {point["l2"]: point["val_rmse"] for point in path.points}
    assert path.l2 == min(errors, key=lambda l2: errors[l2] or 0)
    assert errors[path.l2] == pytest.approx(score_regression(path.head.predict_proba(X_val)[:, 0], y_val)["rmse"])
    alone = fit_path(X, y, None, None, classes=("target",), task="regression")
    left_out = {point["l2"]: point["loo_rmse"] for point in alone.points}
    assert alone.l2 == min(left_out, key=lambda l2: left_out[l2] or 0)
    Z, misses = standardised(X), []
    for one in range(N):
        rest = np.arange(N) != one
        model = Ridge(alpha=alone.l2 * N).fit(Z[rest], y[rest])
        misses.append(model.predict(Z[one : one + 1])[0] - y[one])
    assert left_out[alone.l2] == pytest.approx(float(np.sqrt(np.mean(np.square(misses)))), rel=1e-3)


@pytest.mark.parametrize("unit", [1e-90, 1e-40, 1e37, 1e41, 1e90])
def test_numbers_of_any_unit_give_the_same_head(unit: float) -> None:
    X, _, y = features()
    X_val, _, y_val = features(1)
    plain, other = (
        fit_path(X, y * scale, X_val, y_val * scale, classes=("target",), task="regression") for scale in (1.0, unit)
    )
    assert other.l2 == plain.l2
    np.testing.assert_allclose(other.head.predict_proba(X_val) / unit, plain.head.predict_proba(X_val), rtol=1e-9)
    assert [one["val_rmse"] for one in other.points] == pytest.approx(
        [(one["val_rmse"] or 0) * unit for one in plain.points]
    )


@pytest.mark.parametrize(
    ("task", "solver"), [("multilabel", "lbfgs"), ("multilabel", "sklearn"), ("regression", "newton")]
)
def test_solvers_that_do_not_do_the_task_are_refused(task: str, solver: str) -> None:
    X, Y, y = features()
    target, classes = (Y, NAMES) if task == "multilabel" else (y, ("target",))
    with pytest.raises(UsageError, match=f"the solver {solver} does not support {task} targets; use"):
        fit_linear(X, target, classes=classes, l2=0.1, task=task, solver=solver)


def test_targets_that_do_not_fit_are_refused() -> None:
    X, Y, y = features()
    for target, message in (
        (Y[:, :2], r"y \(200, 2\), expected \(N, D\) and \('N', 3\)"),
        (Y + 1, "in row 0, expected 0 to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            fit_linear(X, target, classes=NAMES, l2=0.1, task="multilabel")
    for target, message in (
        (np.where(y > 100, np.inf, y), "expected a finite number"),
        (0 * y, "one value, expected several"),
        (1e-200 * y, "vary by .*e-19., expected from 1e-100 to 1e.100"),
        (np.array([*"ab"] * (N // 2)), "y of <U1, expected float64"),
    ):
        with pytest.raises(UsageError, match=message):
            fit_linear(X, target, classes=("target",), l2=0.1, task="regression")


def test_heads_say_their_task_and_older_ones_have_none(tmp_path: Path) -> None:
    X, Y, y = features()
    for head in (
        fit_linear(X, Y, classes=NAMES, l2=0.1, task="multilabel"),
        fit_linear(X, y + 1e9, classes=("target",), l2=0.1, task="regression"),
    ):
        head.save(tmp_path)
        loaded = load_head(tmp_path)
        assert loaded.task == head.task
        assert np.array_equal(loaded.predict_proba(X), head.predict_proba(X))
    fit_linear(X, Y[:, 0], classes=("a", "b"), l2=0.1).save(tmp_path)
    record = json.loads((tmp_path / "head.json").read_text())
    del record["task"]
    (tmp_path / "head.json").write_text(json.dumps(record))
    np.testing.assert_allclose(load_head(tmp_path).predict_proba(X).sum(axis=1), 1)
    with pytest.raises(ModelMismatch, match="a head for ranks"):
        LinearHead(np.zeros((1, 2), np.float32), np.zeros(1, np.float32), ("a",), task="ranks")


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_features_in_chunks_give_the_same_head(task: str) -> None:
    X, Y, y = features()
    options = {"classes": NAMES if task == "multilabel" else ("target",), "l2": 0.01, "task": task}
    target = Y if task == "multilabel" else y
    whole = fit_linear(X, target, **options)
    chunked = fit_linear(ChunkedFeatures(X.shape, X.__getitem__), target, **options)
    np.testing.assert_allclose(chunked.predict_proba(X), whole.predict_proba(X), rtol=1e-4, atol=1e-5)

"""Scores with intervals, calibration, and tests of pairs: pure functions of arrays. Any room may enter; torch stays out.

`score` is for choosing (cheap, point estimates), `score_fully` for reporting (with intervals).

>>> score(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))["accuracy"]
1.0
"""

from __future__ import annotations

from embedpipe.metrics._calibration import (
    TEMPERATURES,
    expected_calibration_error,
    fit_temperature,
    reliability,
    soften,
)
from embedpipe.metrics._confident import find_label_errors
from embedpipe.metrics._intervals import mcnemar, mean_interval, paired_interval, wilson_interval
from embedpipe.metrics._multilabel import THRESHOLD, binary_log_loss, score_multilabel
from embedpipe.metrics._regression import score_regression
from embedpipe.metrics._scores import (
    LEAST_PROBABILITY,
    balanced_accuracy,
    balanced_accuracy_interval,
    confusion_matrix,
    log_loss,
    losses,
    macro_f1,
    macro_f1_interval,
    per_class,
    score,
    score_fully,
)
from embedpipe.metrics._similarity import linear_cka

__all__ = [
    "LEAST_PROBABILITY",
    "TEMPERATURES",
    "THRESHOLD",
    "balanced_accuracy",
    "binary_log_loss",
    "balanced_accuracy_interval",
    "confusion_matrix",
    "expected_calibration_error",
    "find_label_errors",
    "fit_temperature",
    "linear_cka",
    "log_loss",
    "losses",
    "macro_f1",
    "macro_f1_interval",
    "mcnemar",
    "mean_interval",
    "paired_interval",
    "per_class",
    "reliability",
    "score",
    "score_fully",
    "score_multilabel",
    "score_regression",
    "soften",
    "wilson_interval",
]

"""Evaluation: metrics with intervals, calibration, paired tests, nearest neighbours and label errors, as functions of arrays.

>>> score(probabilities, labels)["accuracy"]
0.96
"""

from embedpipe.evaluation._calibration import (
    TEMPERATURES,
    expected_calibration_error,
    fit_temperature,
    reliability,
    scale_temperature,
)
from embedpipe.evaluation._intervals import mcnemar, mean_interval, paired_interval, wilson_interval
from embedpipe.evaluation._label_errors import find_label_errors
from embedpipe.evaluation._multilabel import THRESHOLD, binary_log_loss, score_multilabel
from embedpipe.evaluation._neighbours import (
    FALSE_ALARMS,
    MIN_ROWS,
    K,
    copy_ratio,
    find_neighbours,
    find_outliers,
    kth_distance,
    unit_rows,
)
from embedpipe.evaluation._regression import score_regression
from embedpipe.evaluation._scores import (
    MIN_PROBABILITY,
    balanced_accuracy,
    balanced_accuracy_interval,
    confusion_matrix,
    log_loss,
    losses,
    macro_f1_interval,
    per_class,
    score,
    score_fully,
)
from embedpipe.evaluation._similarity import linear_cka

__all__ = [
    "FALSE_ALARMS",
    "K",
    "MIN_PROBABILITY",
    "MIN_ROWS",
    "TEMPERATURES",
    "THRESHOLD",
    "balanced_accuracy",
    "balanced_accuracy_interval",
    "binary_log_loss",
    "confusion_matrix",
    "copy_ratio",
    "expected_calibration_error",
    "find_label_errors",
    "find_neighbours",
    "fit_temperature",
    "kth_distance",
    "linear_cka",
    "log_loss",
    "losses",
    "macro_f1_interval",
    "mcnemar",
    "mean_interval",
    "find_outliers",
    "paired_interval",
    "per_class",
    "reliability",
    "score",
    "score_fully",
    "score_multilabel",
    "score_regression",
    "scale_temperature",
    "unit_rows",
    "wilson_interval",
]

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
from embedpipe.evaluation._neighbours import MIN_ROWS, copy_ratio, find_neighbours, find_outliers, unit_rows
from embedpipe.evaluation._regression import score_regression
from embedpipe.evaluation._scores import confusion_matrix, log_loss, losses, negative_log, per_class, score, score_fully
from embedpipe.evaluation._similarity import linear_cka

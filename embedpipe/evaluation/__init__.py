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

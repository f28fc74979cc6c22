"""Selection: what selects and checks a head on cached features: its configuration, folds, layers, leaks, learning curves.

>>> config = HeadConfig(features.classes)
>>> path = config.select(*features.arrays("train"), *features.arrays("val"))
"""

from embedpipe.selection._fold_assignment import assign_folds
from embedpipe.selection._folds import INNER_FOLDS, OutOfFold, cross_fit, predict_out_of_fold
from embedpipe.selection._head_configuration import HeadConfig, check_classes, check_labelled, check_task
from embedpipe.selection._layers import (
    Candidate,
    is_beyond_noise,
    paired_difference,
    select_blocks,
    select_space,
    try_views,
)
from embedpipe.selection._leaks import SPLIT_ORDER, find_exact, find_groups, find_leaks, find_near, group_leaks
from embedpipe.selection._learning_curve import learning_curve, parse_shots
from embedpipe.selection._views import read_views

"""Selection: what chooses and checks a head on cached features: its configuration, folds, layers, leaks, learning curves."""

from embedpipe.selection._folds import INNER, OutOfFold, assign_folds, cross_fit, out_of_fold
from embedpipe.selection._head_configuration import (
    Fitted,
    Recipe,
    check_classes,
    check_labelled,
    check_neighbours,
    check_task,
)
from embedpipe.selection._layers import Ranked, choose_blocks, choose_space, is_beyond_noise, paired_difference
from embedpipe.selection._leaks import STEPS, find_exact, find_groups, find_leaks, find_near, group_leaks
from embedpipe.selection._learning_curve import learning_curve, parse_shots

__all__ = [
    "Fitted",
    "INNER",
    "OutOfFold",
    "Ranked",
    "Recipe",
    "STEPS",
    "assign_folds",
    "check_classes",
    "check_labelled",
    "check_neighbours",
    "check_task",
    "choose_blocks",
    "choose_space",
    "cross_fit",
    "find_exact",
    "find_groups",
    "find_leaks",
    "find_near",
    "group_leaks",
    "is_beyond_noise",
    "learning_curve",
    "parse_shots",
    "out_of_fold",
    "paired_difference",
]

"""Classifier: a backbone, a head and class names as one deployable object; its predictions and their scores.

>>> Classifier.load("runs/...").predict(["a.jpg"])
"""

from embedpipe.classifier._classifier import Classifier, Reference, classify, save_run
from embedpipe.classifier._network import Network, parameter_groups, release
from embedpipe.classifier._scoring import (
    Predicted,
    Scored,
    answer,
    calibrated,
    confusion_csv,
    confusion_of,
    read_predictions,
    report_scores,
    worst_classes,
)

__all__ = [
    "Classifier",
    "Network",
    "Predicted",
    "Reference",
    "Scored",
    "answer",
    "calibrated",
    "classify",
    "confusion_csv",
    "confusion_of",
    "parameter_groups",
    "read_predictions",
    "release",
    "report_scores",
    "save_run",
    "worst_classes",
]

"""Classifier: a backbone, a head and class names as one deployable object; its predictions and their scores.

>>> Classifier.load("runs/...").predict(["a.jpg"])

`classifier.network` has the network of a classifier for training and export; it imports torch.
"""

from embedpipe.classifier._classifier import Classifier, Reference, classify, save_run
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

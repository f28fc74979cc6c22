"""fit_head: a linear head on cached features, chosen on validation, in seconds; and what its scores are worth.

The doors enter here.

>>> classifier = fit_head(features)
>>> classifier.report["metrics"]["test"]["accuracy"]
"""

from embedpipe.commands.fit_head._fit_head import fit_head

__all__ = ["fit_head"]

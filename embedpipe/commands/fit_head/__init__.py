"""fit_head: fits a head on cached features, selects l2 on val, and reports scores with intervals and leaks.

>>> classifier = fit_head(features)
>>> classifier.report["metrics"]["test"]["accuracy"]
"""

from embedpipe.commands.fit_head._fit_head import fit_head

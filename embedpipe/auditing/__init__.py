"""audit: images whose label, content or place in the data set deserve a look, from cached features alone.

The doors enter here.

>>> audit("pets").counts
{'label': 12, 'outlier': 3, 'duplicate': 5}
"""

from embedpipe.auditing._audit import Audit, Issue, audit

__all__ = ["Audit", "Issue", "audit"]

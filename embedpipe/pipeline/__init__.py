"""Rows for whoever asks: from a manifest to keys, to what the cache holds, and for the rest decode, forward and commit.

Deeds enter here. torch is imported when the first batch is about to run, not before: a run that finds every row in the
cache decodes nothing and forwards nothing.

>>> [filled] = fill_spaces([Target(space, backbone)], manifest, plan_forward(...))
>>> filled.computed, filled.reused
"""

from embedpipe.pipeline._filling import Progress, fill_spaces
from embedpipe.pipeline._looking import Filled, Target, look_up, reuse_space, row_bytes, space_name, space_spec
from embedpipe.pipeline._planning import Planned, PlannedSpace, plan_spaces

__all__ = [
    "Filled",
    "Planned",
    "PlannedSpace",
    "Progress",
    "Target",
    "fill_spaces",
    "look_up",
    "plan_spaces",
    "reuse_space",
    "row_bytes",
    "space_name",
    "space_spec",
]

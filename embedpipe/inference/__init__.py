"""Inference: images through backbones on this machine, and the rows that the cache lacks.

torch is imported when the first batch is about to run: a run that finds every row in the cache loads no model.

>>> [filled] = fill_spaces([Target(space, backbone)], manifest, plan_forward(...))
>>> filled.computed, filled.reused
"""

from embedpipe.inference._drift import TOLERANCE, record_environment, row_distances
from embedpipe.inference._estimate import Planned, PlannedSpace, plan_spaces
from embedpipe.inference._executor import Session
from embedpipe.inference._executor_selection import settle
from embedpipe.inference._extraction import Progress, fill_spaces
from embedpipe.inference._lookup import Filled, Target, look_up, reuse_space, row_bytes, space_name, space_spec
from embedpipe.inference._openvino import OpenVino, graph_name, has_openvino
from embedpipe.inference._runner import Rows, Runner
from embedpipe.inference._settings import Forward, begin_decoding, plan_forward
from embedpipe.inference._spec_memo import question_of, recall, recall_layers, remember, remember_layers
from embedpipe.inference._stream import stream_rows
from embedpipe.inference._torch import Torch

__all__ = [
    "Filled",
    "Forward",
    "OpenVino",
    "Planned",
    "PlannedSpace",
    "Progress",
    "Rows",
    "Runner",
    "Session",
    "TOLERANCE",
    "Target",
    "Torch",
    "begin_decoding",
    "fill_spaces",
    "graph_name",
    "has_openvino",
    "look_up",
    "plan_forward",
    "plan_spaces",
    "question_of",
    "recall",
    "recall_layers",
    "record_environment",
    "remember",
    "remember_layers",
    "reuse_space",
    "row_bytes",
    "row_distances",
    "settle",
    "space_name",
    "space_spec",
    "stream_rows",
]

"""Inference: the features of images on this machine, and the rows that a cache lacks.

torch is imported when a runner is made: an extraction that finds every row in the cache loads no model.

>>> [result] = fill_spaces([Target(space, backbone)], manifest, plan_forward(device="cpu", batch_size="auto", workers=2))
>>> result.computed, result.reused
(1000, 0)
"""

from embedpipe.inference._drift import TOLERANCE, record_environment, row_distances
from embedpipe.inference._executor_selection import settle
from embedpipe.inference._extraction import Progress, estimate_run, fill_spaces
from embedpipe.inference._lookup import Filled, Target, look_up, reuse_space, row_bytes, space_name, space_spec
from embedpipe.inference._openvino import has_openvino
from embedpipe.inference._runner import Rows, Runner, stream_rows
from embedpipe.inference._settings import Forward, begin_decoding, plan_forward
from embedpipe.inference._spec_memo import lookup_layers, lookup_spec, spec_key, store_layers, store_spec

__all__ = [
    "TOLERANCE",
    "Filled",
    "Forward",
    "Progress",
    "Rows",
    "Runner",
    "Target",
    "begin_decoding",
    "estimate_run",
    "fill_spaces",
    "has_openvino",
    "look_up",
    "lookup_layers",
    "lookup_spec",
    "plan_forward",
    "record_environment",
    "reuse_space",
    "row_bytes",
    "row_distances",
    "settle",
    "space_name",
    "space_spec",
    "spec_key",
    "store_layers",
    "store_spec",
    "stream_rows",
]

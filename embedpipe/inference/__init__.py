"""Inference: the features of images on this machine, and the rows that a cache lacks.

torch is imported when a runner is made: an extraction that finds every row in the cache loads no model.

>>> settings = resolve_settings(device="cpu", batch_size="auto", workers=2)
>>> [result] = compute_missing([FeatureRequest(space, backbone)], manifest, settings)
>>> result.computed, result.reused
(1000, 0)
"""

from embedpipe.inference._drift import TOLERANCE, record_environment, row_distances
from embedpipe.inference._executor_selection import select_executor
from embedpipe.inference._extraction import Progress, compute_missing, estimate_run
from embedpipe.inference._lookup import ExtractionResult, FeatureRequest, look_up, reuse_space, row_bytes, space_spec
from embedpipe.inference._openvino import has_openvino
from embedpipe.inference._runner import Rows, Runner, stream_rows
from embedpipe.inference._settings import InferenceSettings, begin_decoding, resolve_settings
from embedpipe.inference._spec_memo import recall, remember, spec_key

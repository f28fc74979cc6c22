"""Executors: what carries images through backbones on this machine: eager torch, torch.compile,
OpenVINO, and torch's own graph with fused and Winograd's convolutions.

A session takes a batch of images for one of its joints and returns the features that it gives; several threads may call it
at once. `forwarding` enters here.

>>> session = Torch(join([backbone])[0], device="cpu")
>>> session(0, pixels)                                      # uint8 (n, H, W, 3)
[array of float32 (n, 512)]
"""

from embedpipe.executors._fused import Fused, has_fused
from embedpipe.executors._openvino import OpenVino, graph_name, has_openvino
from embedpipe.executors._session import Session
from embedpipe.executors._suiting import tiled_share
from embedpipe.executors._torch import Torch

__all__ = ["Fused", "OpenVino", "Session", "Torch", "graph_name", "has_fused", "has_openvino", "tiled_share"]

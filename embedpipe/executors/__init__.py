"""Executors: what carries images through backbones on this machine: eager torch, torch.compile, OpenVINO.

A session takes a batch of images for each joint and returns a feature for each of its backbones; several threads may call
it at once. `forwarding` enters here.

>>> session = open_session("eager", join([backbone]), device="cpu", precision="fp32")
>>> session([pixels])                                       # uint8 (n, H, W, 3)
[array of float32 (n, 512)]
"""

from embedpipe.executors._openvino import OpenVino, graph_name, has_openvino
from embedpipe.executors._session import Session
from embedpipe.executors._torch import Torch

__all__ = ["OpenVino", "Session", "Torch", "graph_name", "has_openvino"]

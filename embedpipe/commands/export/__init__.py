"""Exporting: a run becomes something that needs no embedpipe.

`_export` is the deed, `_formats` writes and opens what timm, torchvision and torch read, `_onnx` what ONNX Runtime reads.

>>> export("20260101-120000-fit-head-0a1b2c", format="onnx").files
['labels.json', 'model.onnx', 'preprocessing.json']
"""

from embedpipe.commands.export._export import Exported, export

__all__ = ["Exported", "export"]

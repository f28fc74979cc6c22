"""Export: write a run as a model that can be used without embedpipe.

`_export` is the command, `_formats` writes the models, opens them and compares their logits with those of the run.

>>> export("20260101-120000-fit-head-0a1b2c", format="onnx").files
['labels.json', 'model.onnx', 'preprocessing.json']
"""

from embedpipe.commands.export._export import Exported, export

"""Images through backbones: what this machine can do, batch by batch, and which layer is at fault when numbers break.

The pipeline, the classifier and the deeds enter here. torch is imported when the first batch is about to run.

>>> runner = Runner([backbone], plan_forward(device="auto", batch_size="auto", workers="auto"))
>>> for rows in stream_rows(items, runner): ...
"""

from embedpipe.forwarding._plan import Forward, begin_decoding, plan_forward
from embedpipe.forwarding._runner import Rows, Runner
from embedpipe.forwarding._settling import settle
from embedpipe.forwarding._stream import stream_rows

__all__ = ["Forward", "Rows", "Runner", "begin_decoding", "plan_forward", "settle", "stream_rows"]

"""Torch: the executor that runs the torch module, as it is or compiled, on any device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.inference._folding import fold

if TYPE_CHECKING:
    import torch

    from embedpipe.backbones import Joint

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Torch:
    """An `Executor` of torch.

    Parameters
    ----------
    joints : list of Joint
    device : str              "cpu", "mps", "cuda" or "cuda:K"
    precision : str           "fp32"; "bf16" and "fp16" by autocast
    channels_last : bool      memory format of images and weights
    compiled : bool           by torch.compile, during the first call
    folded : bool             in fp32, with batch normalisations folded into convolutions
    """

    def __init__(
        self,
        joints: Sequence[Joint],
        *,
        device: str = "cpu",
        precision: str = "fp32",
        channels_last: bool = True,
        compiled: bool = False,
        folded: bool = True,
    ) -> None:
        import torch

        self._device, self._kind = device, device.partition(":")[0]
        self._dtype = getattr(torch, DTYPES[precision])
        self._memory = torch.channels_last if channels_last else torch.contiguous_format
        if (
            self._kind == "cuda" and precision == "fp32"
        ):  # without TF32, which keeps 10 bits and is the default of cuDNN
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        ready = [fold(joint.cpu()) if folded and precision == "fp32" else joint for joint in joints]
        modules = [joint.to(device).to(memory_format=self._memory) for joint in ready]
        self._modules: list[Any] = [torch.compile(module) if compiled else module for module in modules]
        self._own = threading.local()

    def __call__(self, joint: int, images: np.ndarray) -> list[np.ndarray]:
        import torch

        try:
            return self._run(self._modules[joint], images)
        except torch.OutOfMemoryError as exc:
            if self._kind == "cuda":
                torch.cuda.empty_cache()
            raise MemoryError(str(exc)) from exc

    def _run(self, module: Any, images: np.ndarray) -> list[np.ndarray]:
        import torch

        with torch.inference_mode(), self._autocast(), self._stream():
            return [features.float().cpu().numpy() for features in module(self._to_device(images))]

    def _to_device(self, batch: np.ndarray) -> torch.Tensor:
        import torch

        there = torch.from_numpy(batch)
        if self._kind == "cuda":
            there = there.pin_memory()
        if batch.dtype == np.uint8:  # NHWC: in channels-last order after normalisation
            return there.to(self._device, non_blocking=True)
        return there.to(self._device, memory_format=self._memory, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(self._kind, self._dtype, enabled=self._dtype is not torch.float32)

    def _stream(self) -> AbstractContextManager[Any]:
        """Return a CUDA stream for each thread: images of one batch are copied while another is computed."""
        import torch

        if self._kind != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._own.stream)

"""Torch: the executor that runs the torch module, as it is or compiled, on any device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embedpipe.inference._folding import fold
from embedpipe.inference._settings import InferenceSettings

if TYPE_CHECKING:
    from embedpipe.backbones import SharedModel

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Torch:
    """An `Executor` of torch.

    Parameters
    ----------
    shared_models : list of SharedModel
    settings : InferenceSettings    bf16 and fp16 by autocast; "compile" compiles during the first call
    folded : bool         in fp32, fold batch normalisations into convolutions
    """

    def __init__(
        self, shared_models: Sequence[SharedModel], settings: InferenceSettings, *, folded: bool = True
    ) -> None:
        self._device, self._kind = settings.device, settings.device.partition(":")[0]
        is_fp32 = settings.precision == "fp32"
        self._dtype = getattr(torch, DTYPES[settings.precision])
        self._memory = torch.channels_last if settings.channels_last else torch.contiguous_format
        if self._kind == "cuda" and is_fp32:  # without TF32, which keeps 10 bits and is the default of cuDNN
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        ready = [fold(shared_model.cpu()) if folded and is_fp32 else shared_model for shared_model in shared_models]
        modules = [shared_model.to(self._device).to(memory_format=self._memory) for shared_model in ready]
        compiled = settings.executor == "compile"
        self._modules: list[Any] = [torch.compile(module) if compiled else module for module in modules]
        self._own = threading.local()

    def __call__(self, shared_model: int, images: np.ndarray) -> list[np.ndarray]:
        autocast = torch.autocast(self._kind, self._dtype, enabled=self._dtype is not torch.float32)
        try:
            with torch.inference_mode(), autocast, self._stream():
                outputs = self._modules[shared_model](self._to_device(images))
                return [features.float().cpu().numpy() for features in outputs]
        except torch.OutOfMemoryError as exc:
            if self._kind == "cuda":
                torch.cuda.empty_cache()
            raise MemoryError(str(exc)) from exc

    def _to_device(self, batch: np.ndarray) -> torch.Tensor:
        images = torch.from_numpy(batch)
        if self._kind == "cuda":
            images = images.pin_memory()
        if batch.dtype == np.uint8:  # NHWC: in channels-last order after normalisation
            return images.to(self._device, non_blocking=True)
        return images.to(self._device, memory_format=self._memory, non_blocking=True)

    def _stream(self) -> AbstractContextManager[Any]:
        """Return a CUDA stream for each thread: images of one batch are copied while another is computed."""
        if self._kind != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._own.stream)

"""The seam: what every executor is."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Session(Protocol):
    """Images through backbones; safe to call from several threads."""

    def __call__(self, joint: int, images: np.ndarray) -> list[np.ndarray]:
        """Return float32 (n, D) for each feature of a joint.

        Raises
        ------
        MemoryError    the device cannot hold a batch of this size
        """
        ...

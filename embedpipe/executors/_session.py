"""The seam: what every executor is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Session(Protocol):
    """Images through backbones; safe to call from several threads."""

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float32 (n, D) for each backbone, joint by joint, of one array of images for each joint.

        Raises
        ------
        MemoryError    the device cannot hold a batch of this size
        """
        ...

"""The hand-off: the network gives the logits that the head gave on the cached features, proved before the first step."""

from __future__ import annotations

import numpy as np
import torch

from embedpipe.errors import ModelMismatch
from embedpipe.finetuning._photos import Photos
from embedpipe.heads import LinearHead
from embedpipe.network import Network

TOLERANCE = 1e-3


def prove_handoff(network: Network, head: LinearHead, photos: Photos) -> float:
    """Return how far the network's logits are from the head's on the cached features, at most.

    Raises
    ------
    ModelMismatch    farther than 1e-3 x max(1, max |logit|): backbone, transform or head are not those of the cache
    """
    network.eval()
    spec = photos.features.space.spec
    exact = spec["precision"] == "fp32" and spec["stored_dtype"] == "float32"
    worst = largest = 0.0
    with torch.inference_mode():
        for images, these in photos.probe:
            features = photos.features.read(tuple(these)) if exact else network.backbone(images).cpu().numpy()
            logits = head.logits(features)
            worst = max(worst, float(np.abs(network(images).cpu().numpy() - logits).max()))
            largest = max(largest, float(np.abs(logits).max()))
    if not worst <= TOLERANCE * max(1.0, largest):
        raise ModelMismatch(
            f"backbone and head give logits {worst:.2g} away from those on the cached features, "
            f"expected at most {TOLERANCE * max(1.0, largest):.2g}",
            hint="extract and fit the head again",
        )
    return worst

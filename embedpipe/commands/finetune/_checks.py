"""Two proofs: before the first step the network gives the logits that the head gave on the cached features, and what is
frozen has not moved in training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from embedpipe.classifier import Network
from embedpipe.commands.finetune._photos import Photos
from embedpipe.errors import EmbedpipeError, ModelMismatch
from embedpipe.heads import LinearHead
from embedpipe.provenance import digest_arrays
from embedpipe.training import moving_names

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


@contextmanager
def frozen_proved(network: nn.Module, keep_eval: Sequence[nn.Module]) -> Iterator[None]:
    """Compare what training may not change before and after the block."""
    still = set(network.state_dict()) - moving_names(network, keep_eval)
    before = _digests(network, still)
    yield
    moved = [name for name, digest in _digests(network, still).items() if digest != before[name]]
    if moved:
        raise EmbedpipeError(
            f"{len(moved)} frozen tensors moved in training, first {moved[0]}; expected none",
            hint="this is a defect of embedpipe: please report the model and the command",
            moved=moved,
        )


def _digests(network: nn.Module, names: set[str]) -> dict[str, str]:
    state = network.state_dict()
    return {name: digest_arrays({name: state[name]}) for name in sorted(names)}

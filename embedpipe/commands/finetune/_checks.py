"""Two checks: before training, the network gives the logits of the head on cached features; after it, no frozen tensor
has changed a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from embedpipe.classifier import Network
from embedpipe.commands.finetune._sources import ImageSource
from embedpipe.errors import EmbedpipeError, ModelMismatch
from embedpipe.heads import LinearHead
from embedpipe.provenance import digest_arrays
from embedpipe.training import moving_names

TOLERANCE = 1e-3


def check_handoff(network: Network, head: LinearHead, images: ImageSource) -> float:
    """Return the largest difference between the network's logits and those of the head on cached features.

    Features that are not stored in float32 are computed again.

    Raises
    ------
    ModelMismatch    it is more than 1e-3 x max(1, max |logit|): backbone, transform or head are not those of the cache
    """
    network.eval()
    spec = images.features.space.spec
    is_exact = spec["precision"] == "fp32" and spec["stored_dtype"] == "float32"
    expected, logits = [], []
    with torch.inference_mode():
        for batch, samples in images.probe:
            features = images.features.read(tuple(samples)) if is_exact else network.backbone(batch).cpu().numpy()
            expected.append(head.logits(features))
            logits.append(network(batch).cpu().numpy())
    worst = float(np.abs(np.concatenate(logits) - np.concatenate(expected)).max())
    limit = TOLERANCE * max(1.0, float(np.abs(np.concatenate(expected)).max()))
    if not worst <= limit:
        raise ModelMismatch(
            f"backbone and head give logits that differ by {worst:.2g} from those on the cached features, "
            f"expected at most {limit:.2g}",
            hint="extract and fit the head again",
        )
    return worst


@contextmanager
def check_frozen(network: nn.Module, keep_eval: Sequence[nn.Module]) -> Iterator[None]:
    """Compare the digests of all frozen tensors before and after the block.

    Raises
    ------
    EmbedpipeError    one of them has changed
    """
    frozen = set(network.state_dict()) - moving_names(network, keep_eval)
    before = _digests(network, frozen)
    yield
    changed = [name for name, digest in _digests(network, frozen).items() if digest != before[name]]
    if changed:
        raise EmbedpipeError(
            f"{len(changed)} frozen tensors changed during training, the first is {changed[0]}; expected none",
            hint="this is a defect of embedpipe: please report the model and the command",
            moved=changed,
        )


def _digests(network: nn.Module, names: set[str]) -> dict[str, str]:
    state = network.state_dict()
    return {name: digest_arrays({name: state[name]}) for name in sorted(names)}

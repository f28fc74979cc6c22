"""Find the space of each layer and view of each backbone that `extract` is called with, and fill all with one decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embedpipe import inference
from embedpipe.cache import Cache, KeyIndex, Space
from embedpipe.errors import UsageError
from embedpipe.features import PENULTIMATE
from embedpipe.inference import ExtractionResult, FeatureRequest, InferenceSettings

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.data import Manifest

REMOVED = {"pixels": "exact"}  # removed options, which records keep
VIEWED = ("train", "all")  # splits that have views; val and test have the clean images alone

# backbone (a name or a `Backbone`), layer (None: penultimate) and view (0: clean)
Request = tuple[Any, str | None, int]
Result = tuple[
    str, "Backbone | None", Space, ExtractionResult
]  # name of the backbone, the backbone if it was loaded, ...


@dataclass(frozen=True)
class SpaceResolver:
    """Finds the space of a request: by the memo of specs where possible, else by loading the model, once a backbone.

    options : dict     how to load backbones: keyword arguments of `load_backbone` without name and layer
    settings : dict    precision, device and the like: keyword arguments of `resolve_settings`
    augment : str      what makes a view
    """

    cache: Cache
    index: KeyIndex
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    augment: str
    models: dict[str, Backbone] = field(default_factory=dict)

    def expand(self, backbones: Sequence[Any], layers: Sequence[str], views: int) -> list[Request]:
        """Return a request for each view, the clean one first, of each layer of each backbone."""
        if views < 0:
            raise UsageError(f"--views is {views}, expected 0 or more")
        return [
            (backbone, None if name == PENULTIMATE else name, view)
            for view in range(views + 1)
            for backbone in backbones
            for layer in layers or (PENULTIMATE,)
            for name in (self.stages((backbone, layer, view)) if layer == "all" else (layer,))
        ]

    def stages(self, request: Request) -> tuple[str, ...]:
        """Return the names of the stages of a model."""
        key = self.key(request)
        known = inference.recall(self.index, key)
        if known is None:
            backbone = self.load((request[0], None, request[2]))
            known = {"layers": [layer.name for layer in backbone.layers]}
            inference.remember(self.index, key, backbone, **known)
        return tuple(known["layers"])

    def loader(self, request: Request) -> dict[str, Any]:
        """Return the recorded arguments of `load_backbone`; empty for a backbone that was passed as an object."""
        name, layer, _ = request
        return {} if hasattr(name, "spec") else {"name": name, **self.options, **REMOVED, "layer": layer}

    def key(self, request: Request) -> str | None:
        """Return the key of a request in the memo of specs, None for a backbone that was passed as an object."""
        loader, view = self.loader(request), request[2]
        views = {"augment": self.augment, "view": view} if view else {}
        return inference.spec_key({**loader, **views}, self.settings) if loader else None

    def reuse(self, request: Request, manifest: Manifest, *, retry_failed: bool) -> Result | None:
        """Return the space of a request if it has every row already, None if a model has to be loaded to know."""
        known = inference.recall(self.index, self.key(request))
        if known is None:
            return None
        space = self.cache.open_space(known["spec"])
        splits = _splits(request)
        filled = inference.reuse_space(space, manifest, known["record"], splits=splits, retry_failed=retry_failed)
        if filled is None:
            space.ensure_free()  # before a model is loaded, which takes seconds
        return (known["name"], None, space, filled) if filled else None

    def resolve(self, request: Request, settings: InferenceSettings) -> FeatureRequest:
        """Load the backbone of a request and return it with its space."""
        backbone, loader = self.load(request), self.loader(request)
        spec = inference.space_spec(backbone, settings.precision, settings.store_dtype, view=request[2])
        record = inference.record_environment(settings, loader)
        inference.remember(self.index, self.key(request), backbone, name=backbone.name, spec=spec, record=record)
        return FeatureRequest(self.cache.open_space(spec), backbone, loader, _splits(request))

    def load(self, request: Request) -> Backbone:
        """Return the backbone of a request; requests of one name share the model."""
        from embedpipe.backbones import at_layer, load_backbone

        name, layer, view = request
        if hasattr(name, "spec"):
            backbone: Backbone = at_layer(name, layer, pool=self.options["pool"]) if layer else name
        elif name in self.models:
            backbone = at_layer(self.models[name], layer, pool=self.options["pool"])
        else:
            backbone = self.models[name] = load_backbone(name, **self.options, layer=layer)
        return backbone.augmented(self.augment, seed=self.options["seed"], view=view) if view else backbone


def complete_spaces(
    resolver: SpaceResolver, requests: Sequence[Request], manifest: Manifest, *, retry_failed: bool, **writing: Any
) -> list[Result]:
    """Return the space of each request with all its rows; models are loaded only for spaces that lack some."""
    results = [resolver.reuse(request, manifest, retry_failed=retry_failed) for request in requests]
    rest = [n for n, result in enumerate(results) if result is None]
    if rest:
        inference.begin_decoding(resolver.settings["workers"], len(manifest.samples))
        settings = replace(inference.resolve_settings(**resolver.settings), graphs=resolver.cache.graphs_folder)
        feature_requests = [resolver.resolve(requests[n], settings) for n in rest]
        computed = inference.compute_missing(feature_requests, manifest, settings, retry_failed=retry_failed, **writing)
        for n, one, filled in zip(rest, feature_requests, computed, strict=True):
            results[n] = (one.backbone.name, one.backbone, one.space, filled)
    return [result for result in results if result]


def plan_spaces(
    resolver: SpaceResolver, requests: Sequence[Request], manifest: Manifest, *, retry_failed: bool
) -> tuple[list[tuple[Space, int, int, int, int]], tuple[float, int, str]]:
    """Return what `complete_spaces` would take; nothing is written, and no model is loaded where no row is missing.

    Returns
    -------
    for each space: the space, feature_dim, missing rows, stored rows, bytes of the missing rows
    expected seconds, number of images measured, executor
    """
    results = [resolver.reuse(request, manifest, retry_failed=retry_failed) for request in requests]
    if all(results):
        there = [(space, space.feature_dim or 0, 0, filled.reused, 0) for *_, space, filled in filter(None, results)]
        return there, (0.0, 0, "none")
    settings = inference.resolve_settings(**resolver.settings)
    feature_requests = [resolver.resolve(request, settings) for request in requests]
    lookups, spaces = [], []
    for one in feature_requests:
        found = inference.look_up(one.space, manifest, splits=one.splits, retry_failed=retry_failed)
        lookups.append(found)
        missing, stored = len(found.missing), len(found.wanted) - len(found.missing)
        spaces.append((one.space, one.backbone.feature_dim, missing, stored, missing * inference.row_bytes(one)))
    return spaces, inference.estimate_run(feature_requests, lookups, manifest, settings)


def _splits(request: Request) -> tuple[str, ...] | None:
    return VIEWED if request[2] else None

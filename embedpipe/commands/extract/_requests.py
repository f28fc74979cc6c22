"""From what a user asks for to filled spaces: every layer and view of every backbone, with one decode for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embedpipe.cache import Cache, KeyIndex, Space
from embedpipe.errors import UsageError
from embedpipe.features import PENULTIMATE
from embedpipe.inference import (
    Filled,
    Planned,
    PlannedSpace,
    Target,
    begin_decoding,
    fill_spaces,
    plan_forward,
    plan_spaces,
    question_of,
    recall,
    recall_layers,
    remember,
    remember_layers,
    reuse_space,
    space_name,
    space_spec,
)

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone
    from embedpipe.data import Manifest

REMOVED = {"pixels": "exact"}  # options that were removed, in records as they always were
VIEWED = ("train", "all")  # splits that have views; val and test are only seen as they are


@dataclass(frozen=True)
class Wish:
    """One layer of one backbone, in one view, as asked for.

    backbone : str or Backbone    a name, or a backbone handed over from Python
    layer : str or None           None: what enters the classifier
    shape : dict                  how to load it: the other keyword arguments of `load_backbone`
    settings : dict               precision, device and the like: keyword arguments of `plan_forward`
    augment, view                 how view 1, 2, ... differs from the clean image; view 0 is the clean one
    """

    backbone: str | Backbone
    layer: str | None
    shape: Mapping[str, Any]
    settings: Mapping[str, Any]
    augment: str = "none"
    view: int = 0

    @property
    def named(self) -> bool:
        return not hasattr(self.backbone, "spec")

    @property
    def loader(self) -> dict[str, Any]:
        """Keyword arguments of `load_backbone` as they are recorded; empty where the backbone came as an object."""
        return {"name": self.backbone, **self.shape, **REMOVED, "layer": self.layer} if self.named else {}

    @property
    def question(self) -> str:
        """What `recall` knows the answer of, for a named backbone."""
        views = {"augment": self.augment, "view": self.view} if self.view else {}
        return question_of({**self.loader, **views}, self.settings)


@dataclass(frozen=True)
class Extracted:
    """One space after the deed: the backbone (its name alone where it was not loaded), where it is, what it took."""

    name: str
    backbone: Backbone | None
    space: Space
    filled: Filled

    def to_dict(self) -> dict[str, Any]:
        return {
            "backbone": self.name,
            "layer": self.space.spec["layer"],
            "view": self.space.spec["view"],
            "fingerprint": self.space.fingerprint,
            "space": str(self.space.folder),
            "features": str(self.space.features_path),
            "feature_dim": self.space.feature_dim,
            "rows": len(self.space.view()),
            "computed": self.filled.computed,
            "reused": self.filled.reused,
            "pending_shards": self.space.pending_shards,
            "failed": [vars(failure) for failure in self.filled.failed],
            "bottleneck": self.filled.bottleneck,
            "executor": self.filled.executor,
            "executor_difference": self.filled.difference,
        }


@dataclass
class Workshop:
    """What wishes are fulfilled with: the cache, the memo, and each model, loaded once and only when there is work."""

    cache: Cache
    index: KeyIndex
    settings: Mapping[str, Any]
    models: dict[str, Backbone] = field(default_factory=dict)

    def wishes_of(
        self,
        backbones: Sequence[str | Backbone],
        layers: Sequence[str],
        shape: Mapping[str, Any],
        *,
        views: int,
        augment: str,
    ) -> list[Wish]:
        """Return a wish for each view, the clean one first, of each layer of each backbone."""
        if views < 0:
            raise UsageError(f"--views is {views}, expected 0 or more")
        asked = [
            Wish(name, None if layer == PENULTIMATE else layer, shape, self.settings, augment if view else "none", view)
            for view in range(views + 1)
            for name in backbones
            for layer in layers or (PENULTIMATE,)
        ]
        return [one for wish in asked for one in self.expand(wish)]

    def expand(self, wish: Wish) -> list[Wish]:
        """Return a wish for each stage of the model where all are asked for."""
        if wish.layer != "all":
            return [wish]
        layers = recall_layers(self.index, wish.question) if wish.named else None
        if layers is None:
            backbone = self.load(replace(wish, layer=None))
            layers = tuple(layer.name for layer in backbone.layers)
            if wish.named:
                remember_layers(self.index, wish.question, backbone)
        return [replace(wish, layer=layer) for layer in layers]

    def reuse(self, wish: Wish, manifest: Manifest, *, retry_failed: bool) -> Extracted | None:
        """Return a space that has every row already, None where it takes a model to tell."""
        known = recall(self.index, wish.question) if wish.named else None
        if known is None:
            return None
        space = self.cache.open_space(known.spec, name=space_name(known.spec))
        splits = VIEWED if wish.view else None
        filled = reuse_space(space, manifest, known.record, splits=splits, retry_failed=retry_failed)
        if filled is None:
            space.ensure_free()  # before a model is loaded in vain
        return Extracted(known.name, None, space, filled) if filled else None

    def fill(self, wishes: Sequence[Wish], manifest: Manifest, **writing: Any) -> list[Extracted]:
        """Load what is wished for and compute what is missing, all together."""
        begin_decoding(self.settings["workers"], len(manifest.samples))
        forward = plan_forward(**self.settings)
        targets = [self._target(wish, forward) for wish in wishes]
        filled = fill_spaces(targets, manifest, forward, graphs=self.cache.graphs_folder, **writing)
        return [Extracted(t.backbone.name, t.backbone, t.space, one) for t, one in zip(targets, filled, strict=True)]

    def plan(self, wishes: Sequence[Wish], manifest: Manifest, *, retry_failed: bool) -> Planned:
        """Return what filling would take; nothing is written, and no model is loaded where nothing is missing."""
        complete = [self.reuse(wish, manifest, retry_failed=retry_failed) for wish in wishes]
        if all(complete):
            found = [one for one in complete if one]
            return Planned(tuple(PlannedSpace(x.space, x.space.feature_dim or 0, 0, x.filled.reused, 0) for x in found))
        forward = plan_forward(**self.settings)
        return plan_spaces(
            [self._target(wish, forward) for wish in wishes], manifest, forward, retry_failed=retry_failed
        )

    def load(self, wish: Wish) -> Backbone:
        """Return the backbone of a wish; those of one name share the model."""
        from embedpipe.backbones import Backbone, at_layer, load_backbone
        from embedpipe.images import Transform

        if isinstance(wish.backbone, Backbone):
            backbone = at_layer(wish.backbone, wish.layer, pool=wish.shape["pool"]) if wish.layer else wish.backbone
        elif wish.backbone in self.models:
            backbone = at_layer(self.models[wish.backbone], wish.layer, pool=wish.shape["pool"])
        else:
            backbone = self.models[wish.backbone] = load_backbone(wish.backbone, **wish.shape, layer=wish.layer)
        if not wish.view:
            return backbone
        if not isinstance(backbone.transform, Transform):
            raise UsageError(
                "--views of a backbone with a transform of your own", hint="use an embedpipe.images.Transform"
            )
        transform = replace(backbone.transform, augment=wish.augment, seed=wish.shape["seed"], view=wish.view)
        return replace(backbone, transform=transform, spec={**backbone.spec, "transform": transform.to_dict()})

    def _target(self, wish: Wish, forward: Any) -> Target:
        from embedpipe.inference import record_environment

        loaded = self.load(wish)
        spec = space_spec(loaded, forward.precision, forward.store_dtype, view=wish.view)
        if wish.named:
            remember(self.index, wish.question, loaded, spec, record_environment(forward, wish.loader))
        space = self.cache.open_space(spec, name=space_name(spec))
        return Target(space, loaded, wish.loader, VIEWED if wish.view else None)

"""Activations at the cut, kept in the cache: what is frozen runs once an image and view, not once an epoch.

>>> activations, y = next(kept.shuffled(1, seed=0, augment="standard"))
>>> network.backbone = kept.tail; network(activations)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, Cut, trunk_of
from embedpipe.cache import Cache
from embedpipe.commands.finetune._photos import Photos
from embedpipe.data import Sample
from embedpipe.features import FeatureSet
from embedpipe.images import Transform
from embedpipe.inference import Filled, Forward, Progress, Target, fill_spaces, plan_forward, space_name, space_spec
from embedpipe.training import Ranks

TRAINED, HELD = ("train",), ("val", "test")


class Features(nn.Module):
    """The tail of a cut behind the last layer: nothing of the backbone is left to run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class Place:
    """Where a network of a frozen trunk can be cut.

    trunk : Backbone     images -> activation, flattened
    tail : nn.Module     activation (N, *shape) -> features (N, D)
    layer : str          what the activation enters; "head" where no layer is unfrozen
    """

    trunk: Backbone
    tail: nn.Module
    layer: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, backbone: Backbone, cut: Cut | None) -> Place:
        if cut is None:
            return cls(backbone, Features(backbone.module.model), "head", (backbone.feature_dim,))
        return cls(trunk_of(backbone, cut), cut.tail, cut.layer, cut.shape)

    def target(
        self, cache: Cache, photos: Photos, dtype: str, splits: tuple[str, ...], view: int, **look: Any
    ) -> Target:
        """Return the space of some splits in one view; `look` are the arguments of `Photos.view`."""
        trunk = self.trunk
        if view and isinstance(transform := photos.view(view, **look), Transform):
            trunk = replace(trunk, transform=transform, spec={**trunk.spec, "transform": transform.to_dict()})
        spec = space_spec(trunk, "fp32", dtype, view=view)
        loader = photos.features.loader if self.layer == "head" and not view else {}
        return Target(cache.open_space(spec, name=space_name(spec)), trunk, loader, splits)


@dataclass(frozen=True)
class Activations:
    """The samples of `photos` as activations at a cut: the same batches, without an image.

    views : tuple of FeatureSet    of the train split; one of them is drawn for each image and epoch
    held : FeatureSet              of val and test, as they are
    """

    photos: Photos
    place: Place
    views: tuple[FeatureSet, ...]
    held: FeatureSet

    @property
    def tail(self) -> nn.Module:
        return self.place.tail

    @property
    def features(self) -> FeatureSet:
        return self.photos.features

    @property
    def forward(self) -> Forward:
        return self.photos.forward

    @property
    def ranks(self) -> Ranks:
        return self.photos.ranks

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return max(1, len(self.samples("train")) // (self.forward.batch_size * self.ranks.count))

    def samples(self, split: str) -> tuple[Sample, ...]:
        """Return the samples that have a row in every view."""
        kept = [set(one.samples(split)) for one in (self.views if split in TRAINED else (self.held,))]
        return tuple(sample for sample in self.photos.samples(split) if all(sample in some for some in kept))

    def shuffled(self, epoch: int, *, seed: int, augment: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield activations (n, *shape) and y int64 (n,) of the train split in a random order, as `Photos.shuffled` does.

        Each image is seen in one of its views, drawn anew for each epoch.
        """
        samples, size, ranks = self.samples("train"), self.forward.batch_size, self.ranks
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(samples), generator=generator).tolist()
        order = order[: self.steps * size * ranks.count][ranks.rank :: ranks.count]
        drawn = torch.randint(len(self.views), (len(samples),), generator=generator).numpy()
        for first in range(0, len(order), size):
            these = [samples[k] for k in order[first : first + size]]
            yield self._read(these, drawn[order[first : first + size]], self.views), self.photos.labels(these)

    def ordered(self, split: str) -> Iterator[tuple[Tensor, Sequence[Sample]]]:
        """Yield the activations of val or test, and their samples."""
        samples, size = self.samples(split), self.forward.batch_size
        for first in range(0, len(samples), size):
            these = samples[first : first + size]
            yield self._read(these, np.zeros(len(these), np.int64), (self.held,)), these

    def _read(self, samples: Sequence[Sample], drawn: np.ndarray, views: Sequence[FeatureSet]) -> Tensor:
        """Return activations float32 (n, *shape) on the device, each from the view drawn for it."""
        rows = np.empty((len(samples), *self.place.shape), np.float32)
        for number in np.unique(drawn).tolist():
            of = np.flatnonzero(drawn == number)
            rows[of] = views[number].read(tuple(samples[k] for k in of.tolist())).reshape(-1, *self.place.shape)
        activations = torch.from_numpy(rows).to(self.forward.device)
        spatial = activations.ndim == 4
        return activations.contiguous(memory_format=torch.channels_last) if spatial else activations


def spaces_of(place: Place, cache: Cache, photos: Photos, dtype: str, views: int, **look: Any) -> list[Target]:
    """Return the spaces to fill: train in each view, or clean, as `dtype`; last, val and test, exactly.

    Where train is clean and exact too, one space holds all.

    Parameters
    ----------
    look : augment and seed, the arguments of `Photos.view`
    """
    if not views and dtype == "float32":
        return [place.target(cache, photos, dtype, (*TRAINED, *HELD), 0, **look)]
    trained = [place.target(cache, photos, dtype, TRAINED, view, **look) for view in range(1, views + 1) or (0,)]
    return [*trained, place.target(cache, photos, "float32", HELD, 0, **look)]


def fill(cache: Cache, photos: Photos, targets: Sequence[Target], progress: Progress | None) -> dict[str, int]:
    """Compute what the spaces lack, and return `rows`, `bytes` and `reused` of them."""
    filled = dict[int, Filled]()
    machine: dict[str, Any] = {"device": photos.forward.device, "workers": photos.forward.workers, "batch_size": "auto"}
    for dtype in dict.fromkeys(_dtype(target) for target in targets):
        some = [number for number, target in enumerate(targets) if _dtype(target) == dtype]
        forward, these = plan_forward(**machine, store_dtype=dtype), [targets[number] for number in some]
        done = fill_spaces(these, photos.features.manifest, forward, progress=progress, graphs=cache.graphs_folder)
        filled |= zip(some, done, strict=True)
    counts = {"rows": 0, "bytes": 0, "reused": 0}
    for number, target in enumerate(targets):
        rows = filled[number].computed + filled[number].reused
        counts["rows"] += rows
        counts["bytes"] += rows * target.backbone.feature_dim * np.dtype(_dtype(target)).itemsize
        counts["reused"] += filled[number].reused
    return counts


def read(place: Place, photos: Photos, targets: Sequence[Target]) -> Activations:
    """Return the activations that lie in the spaces."""
    *views, held = (FeatureSet(photos.features.manifest, target.space) for target in targets)
    return Activations(photos, place, tuple(views) or (held,), held)


def _dtype(target: Target) -> str:
    return str(target.space.spec["stored_dtype"])

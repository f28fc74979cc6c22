"""Cached activations at a cut: the frozen layers run once per image and view instead of once per epoch.

>>> activations = ActivationCache(*cut_backbone(backbone, unfrozen), images, cache, views=0)
>>> activations.fill("float16", progress=None)
>>> x, y = next(activations.source("float16").training_batches(1))
>>> network.backbone = activations.tail
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from embedpipe.backbones import Backbone, cut_before, trunk_backbone
from embedpipe.cache import Cache
from embedpipe.commands.finetune._sources import ImageSource, TrainingSource
from embedpipe.data import Sample
from embedpipe.features import FeatureSet
from embedpipe.inference import FeatureRequest, Progress, compute_missing, resolve_settings, space_spec


def cut_backbone(backbone: Backbone, unfrozen: Sequence[str]) -> tuple[Backbone, nn.Module, str, tuple[int, ...]]:
    """Cut a backbone before the first of its unfrozen parameters.

    Returns
    -------
    trunk : Backbone     images -> activation, flattened
    tail : nn.Module     activation (N, *shape) -> features (N, D)
    layer : str          the layer that takes the activation; "head" where only the head is trained
    shape : tuple of int

    Raises
    ------
    UsageError    the model cannot be cut there
    """
    cut = cut_before(backbone, unfrozen)
    if cut is None:
        tail = nn.Identity()
        tail.add_module("model", backbone.module.model)  # so that the state dict stays complete
        return backbone, tail, "head", (backbone.feature_dim,)
    return trunk_backbone(backbone, cut), cut.tail, cut.layer, cut.shape


@dataclass(frozen=True)
class ActivationCache:
    """The spaces that hold a data set's activations at a cut.

    trunk, tail, layer, shape    of the cut, as `cut_backbone` returns them
    views : int                  augmented views of each training image; 0: the image without augmentation
    """

    trunk: Backbone
    tail: nn.Module
    layer: str
    shape: tuple[int, ...]
    images: ImageSource
    cache: Cache
    views: int

    def targets(self, dtype: str) -> list[FeatureRequest]:
        """Return the space of each view of train, stored as `dtype`, and last the space of val and test, in float32.

        One space holds everything where train is stored in float32 without views.
        """
        if not self.views and dtype == "float32":
            return [self._target(dtype, ("train", "val", "test"), 0)]
        views = range(1, self.views + 1) or (0,)
        return [*(self._target(dtype, ("train",), view) for view in views), self._target("float32", ("val", "test"), 0)]

    def _target(self, dtype: str, splits: tuple[str, ...], view: int) -> FeatureRequest:
        trunk, images = self.trunk, self.images
        trunk = trunk.augmented(images.augment, seed=images.seed, view=view) if view else trunk
        spec = space_spec(trunk, "fp32", dtype, view=view)
        loader = images.features.loader if self.layer == "head" and not view else {}
        return FeatureRequest(self.cache.open_space(spec), trunk, loader, splits)

    def fill(self, dtype: str, progress: Progress | None) -> dict[str, int]:
        """Compute missing activations, and return the `rows`, `bytes` and `reused` rows of all spaces."""
        manifest, forward, targets = self.images.features.manifest, self.images.forward, self.targets(dtype)
        counts = Counter({"rows": 0, "bytes": 0, "reused": 0})
        for stored in dict.fromkeys((dtype, "float32")):
            group = [target for target in targets if target.space.spec["stored_dtype"] == stored]
            plan = resolve_settings(
                device=forward.device, workers=forward.workers, batch_size="auto", store_dtype=stored
            )
            plan = replace(plan, graphs=self.cache.graphs_folder)
            filled = compute_missing(group, manifest, plan, progress=progress)
            for target, result in zip(group, filled, strict=True):
                rows = result.computed + result.reused
                size = target.backbone.feature_dim * np.dtype(stored).itemsize
                counts.update(rows=rows, bytes=rows * size, reused=result.reused)
        return dict(counts)

    def source(self, dtype: str) -> ActivationSource:
        """Return the filled spaces as a source of batches."""
        images, spaces = self.images, [target.space for target in self.targets(dtype)]
        *views, held_out = (FeatureSet(images.features.manifest, space) for space in spaces)
        shared = (images.features, images.forward, images.ranks, images.seed)
        return ActivationSource(*shared, self.shape, tuple(views) or (held_out,), held_out)


@dataclass(frozen=True)
class ActivationSource(TrainingSource):
    """Cached activations in place of images.

    shape : tuple of int           of one activation
    views : tuple of FeatureSet    of the train split; one is drawn at random for each image in each epoch
    held_out : FeatureSet          of val and test
    """

    shape: tuple[int, ...]
    views: tuple[FeatureSet, ...]
    held_out: FeatureSet

    def samples(self, split: str) -> tuple[Sample, ...]:
        stored = [set(view.samples(split)) for view in (self.views if split == "train" else (self.held_out,))]
        labelled = self.features.samples(split, labelled=True)
        return tuple(sample for sample in labelled if all(sample in view for view in stored))

    def training_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        samples, (order, generator) = self.samples("train"), self.shuffle(epoch)
        drawn = torch.randint(len(self.views), (len(samples),), generator=generator).numpy()
        for activations, batch in self._batches([samples[k] for k in order], drawn[order], self.views):
            yield activations, self.labels(batch)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Sequence[Sample]]]:
        samples = self.samples(split)
        return self._batches(samples, np.zeros(len(samples), np.int64), (self.held_out,))

    def _batches(
        self, samples: Sequence[Sample], drawn: np.ndarray, views: Sequence[FeatureSet]
    ) -> Iterator[tuple[Tensor, Sequence[Sample]]]:
        """Yield activations float32 (n, *shape) on the device and their samples, sample k from the view `drawn[k]`."""
        size = self.forward.batch_size
        for start in range(0, len(samples), size):
            batch, numbers = samples[start : start + size], drawn[start : start + size]
            rows = np.empty((len(batch), *self.shape), np.float32)
            for number in np.unique(numbers).tolist():
                selected = np.flatnonzero(numbers == number)
                rows[selected] = views[number].read(tuple(batch[k] for k in selected.tolist())).reshape(-1, *self.shape)
            activations = torch.from_numpy(rows).to(self.forward.device)
            is_map = activations.ndim == 4
            yield activations.contiguous(memory_format=torch.channels_last) if is_map else activations, batch

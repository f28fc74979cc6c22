"""Sources of training batches. `ImageSource` decodes images anew in each epoch; `_activations` reads cached activations.

>>> images, y = next(source.training_batches(epoch=1))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedpipe.backbones import Backbone
from embedpipe.classifier import Scored
from embedpipe.classifier.network import Network
from embedpipe.data import Sample
from embedpipe.errors import warn
from embedpipe.features import FeatureSet
from embedpipe.images import Transform, image_batches
from embedpipe.inference import InferenceSettings
from embedpipe.training import Ranks

ImageTransform = Callable[[Any], Tensor]
PROBE_IMAGES = 32


@dataclass(frozen=True)
class TrainingSource(ABC):
    """Batches of a data set as inputs of a network. Each rank reads its own part of a training batch.

    features : FeatureSet    the data set: samples, labels and classes
    forward : InferenceSettings        device, number of decoding processes, and batch size of one rank
    """

    features: FeatureSet
    forward: InferenceSettings
    ranks: Ranks
    seed: int

    @abstractmethod
    def samples(self, split: str) -> tuple[Sample, ...]:
        """Return the labelled samples of a split that this source has inputs for."""

    @abstractmethod
    def training_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs float32 (n, ...) and y int64 (n,) of the train split in random order, whole batches only."""

    @abstractmethod
    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Sequence[Sample]]]:
        """Yield inputs float32 (n, ...) of a split without augmentation, and their samples."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return max(1, len(self.samples("train")) // (self.forward.batch_size * self.ranks.count))

    def labels(self, samples: Sequence[Sample]) -> Tensor:
        """Return class indices int64 (n,) on the device."""
        return torch.from_numpy(self.features.manifest.targets(samples)).to(self.forward.device)

    def shuffle(self, epoch: int) -> tuple[list[int], torch.Generator]:
        """Return this rank's positions in the train split for one epoch, and the generator that drew them."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.samples("train")), generator=generator).tolist()
        used = self.steps * self.forward.batch_size * self.ranks.count
        return order[:used][self.ranks.rank :: self.ranks.count], generator


@dataclass(frozen=True)
class ImageSource(TrainingSource):
    """The images of a data set, transformed as the backbone expects them.

    augment : str    augmentation of training images
    """

    augment: str
    backbone: Backbone

    def samples(self, split: str) -> tuple[Sample, ...]:
        return self.features.samples(split, labelled=True)

    def training_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        samples, (order, _) = self.samples("train"), self.shuffle(epoch)
        for images, batch in self._batches([samples[k] for k in order], self.view_transform(epoch)):
            yield images, self.labels(batch)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Sequence[Sample]]]:
        return self._batches(self.samples(split), self.backbone.transform)

    @cached_property
    def probe(self) -> list[tuple[Tensor, Sequence[Sample]]]:
        """The first PROBE_IMAGES images of the train split, for checks and measurements before training."""
        return list(self._batches(self.samples("train")[:PROBE_IMAGES], self.backbone.transform))

    def view_transform(self, view: int) -> ImageTransform:
        """Return the transform of one augmented view, the same that `extract --views` applies.

        Raises
        ------
        UsageError    augmentation of a backbone whose transform is not an embedpipe.images.Transform
        """
        if self.augment == "none":
            return self.backbone.transform
        return self.backbone.augmented(self.augment, seed=self.seed, view=view).transform

    def _batches(
        self, samples: Sequence[Sample], transform: ImageTransform
    ) -> Iterator[tuple[Tensor, Sequence[Sample]]]:
        """Yield images float32 (n, 3, H, W) on the device and their samples; warn about unreadable images."""
        pending: dict[bytes, deque[Sample]] = defaultdict(deque)
        for sample in samples:
            pending[sample.key].append(sample)
        items = [(sample.key, self.features.manifest.byte_source_of(sample)) for sample in samples]
        size, workers = self.forward.batch_size, self.forward.workers
        for batch in image_batches(items, [transform], batch_size=size, workers=workers):
            for failed in batch.failures:
                path = self.features.manifest.display_name(pending[failed.key].popleft())
                warn(f"{path} is left out: {failed.reason}")
            if batch.keys:
                images = torch.from_numpy(batch.images[0]).to(self.forward.device)
                images = transform.normalise(images) if isinstance(transform, Transform) else images
                yield images.contiguous(memory_format=torch.channels_last), [pending[k].popleft() for k in batch.keys]


def score_split(network: Network, source: TrainingSource, split: str) -> Scored:
    """Return the samples of a split and their class probabilities float64 (N, C)."""
    samples: list[Sample] = []
    probabilities = [np.empty((0, network.head.out_features))]
    with torch.inference_mode():
        for inputs, batch in source.evaluation_batches(split):
            probabilities.append(network(inputs).double().softmax(dim=1).cpu().numpy())
            samples += batch
    return Scored(tuple(samples), np.concatenate(probabilities))

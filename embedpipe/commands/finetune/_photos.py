"""Photos: the images of a data set, decoded anew each epoch, as batches for a network.

>>> images, y, samples = next(photos.batches(photos.samples("train")))
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from embedpipe.backbones import Backbone
from embedpipe.classifier import Network, Scored
from embedpipe.data import Sample
from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.features import FeatureSet
from embedpipe.images import Transform, image_batches
from embedpipe.inference import Forward
from embedpipe.training import Ranks

Images = Callable[[Any], torch.Tensor]
PROBED = 32
ALONE = Ranks()


@dataclass(frozen=True)
class Photos:
    """The images of a data set as batches for a network, with their class indices; each rank trains on its part of a batch.

    forward : Forward    its `batch_size` is that of one rank
    """

    features: FeatureSet
    backbone: Backbone
    forward: Forward
    ranks: Ranks = ALONE

    def samples(self, split: str) -> tuple[Sample, ...]:
        return self.features.samples(split, labelled=True)

    def batches(
        self, samples: Sequence[Sample], transform: Images | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[Sample]]]:
        """Yield images float32 (n, 3, H, W), y int64 (n,) on the device, and their samples; unreadable ones are warned of.

        Parameters
        ----------
        transform : callable    of an image, instead of the backbone's
        """
        waiting: dict[bytes, deque[Sample]] = defaultdict(deque)
        for sample in samples:
            waiting[sample.key].append(sample)
        items = [(sample.key, self.features.manifest.place_of(sample)) for sample in samples]
        transform, size = transform or self.backbone.transform, self.forward.batch_size
        for batch in image_batches(items, [transform], batch_size=size, workers=self.forward.workers):
            for failed in batch.failures:
                path = self.features.manifest.name_of(waiting[failed.key].popleft())
                warnings.warn(f"{path} is left out: {failed.reason}", EmbedpipeWarning, stacklevel=2)
            if batch.keys:
                these = [waiting[key].popleft() for key in batch.keys]
                there = torch.from_numpy(batch.images[0]).to(self.forward.device)
                images = transform.normalise(there) if isinstance(transform, Transform) else there
                images = images.contiguous(memory_format=torch.channels_last)
                yield images, self.labels(these), these

    def labels(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return class indices int64 (n,) on the device."""
        numbers = {name: number for number, name in enumerate(self.features.classes)}
        return torch.tensor([numbers[sample.label or ""] for sample in samples], device=self.forward.device)

    @cached_property
    def probe(self) -> list[tuple[torch.Tensor, list[Sample]]]:
        """The first images of the train split, PROBED at most, to prove things on before training."""
        return [(images, these) for images, _, these in self.batches(self.samples("train")[:PROBED])]

    def ordered(self, split: str) -> Iterator[tuple[torch.Tensor, Sequence[Sample]]]:
        """Yield the images of a split as they are, and their samples."""
        return ((images, these) for images, _, these in self.batches(self.samples(split)))

    def shuffled(self, epoch: int, *, seed: int, augment: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the train split in a random order, whole batches only; what is left over comes in another epoch."""
        samples, size = self.samples("train"), self.forward.batch_size * self.ranks.count
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(samples), generator=generator).tolist()
        chosen = [samples[k] for k in order[: self.steps * size][self.ranks.rank :: self.ranks.count]]
        for images, y, _ in self.batches(chosen, self.view(epoch, seed=seed, augment=augment)):
            yield images, y

    def view(self, epoch: int, *, seed: int, augment: str) -> Images:
        """Return the transform of one epoch: a view of its own, as `extract --views` makes them."""
        transform = self.backbone.transform
        if augment == "none":
            return transform
        if not isinstance(transform, Transform):
            raise UsageError(
                f"--augment {augment} of a backbone with a transform of your own",
                hint="use an embedpipe.images.Transform, or --augment none",
            )
        return replace(transform, augment=augment, seed=seed, view=epoch)

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return max(1, len(self.samples("train")) // (self.forward.batch_size * self.ranks.count))


def score_batches(network: Network, batches: Iterable[tuple[torch.Tensor, Sequence[Sample]]]) -> Scored:
    """Return the samples of batches and the probabilities float64 (N, C) that the network gives them."""
    samples: list[Sample] = []
    rows = [np.empty((0, network.head.out_features))]
    with torch.inference_mode():
        for inputs, these in batches:
            rows.append(network(inputs).double().softmax(dim=1).cpu().numpy())
            samples += these
    return Scored(tuple(samples), np.concatenate(rows))

"""FeatureSet: the cached features of a data set, by split, read when asked for.

What `extract` returns and `fit_head` takes. Labels and splits come from the sample table, rows from a space; a row is read
from the memory-mapped file when somebody looks at it.

>>> X, y = open_features(Cache(Path("cache"))).arrays("train")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.cache import Cache, Space, dataset_name
from embedpipe.errors import UsageError
from embedpipe.manifest import SPLITS, Manifest, Sample

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone


@dataclass(frozen=True)
class FeatureSet:
    """Features of one data set in one space.

    manifest : Manifest     samples with label, split and group
    space : Space           where the rows are
    backbone : Backbone     what made them, where it is at hand
    summary : dict          what extracting them took (the JSON of `extract`)
    """

    manifest: Manifest
    space: Space
    backbone: Backbone | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """Name of the data set's sample table."""
        return dataset_name(self.manifest)

    @property
    def loader(self) -> dict[str, Any]:
        """Keyword arguments of `load_backbone` that made the rows; empty for a backbone handed over as an object."""
        return self.space.loader

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def feature_dim(self) -> int:
        return self.space.feature_dim or 0

    @cached_property
    def _view(self) -> Any:
        return self.space.view()

    @cached_property
    def _present(self) -> tuple[Sample, ...]:
        view = self._view
        return tuple(sample for sample in self.manifest.samples if sample.key in view)

    @property
    def missing(self) -> int:
        """Samples without a row that are not recorded failures: what another `extract` would compute."""
        view = self._view
        return sum(s.key not in view and s.key not in view.failures for s in self.manifest.samples)

    @property
    def splits(self) -> dict[str, int]:
        """Count of samples with a row, by split."""
        counts = Counter(sample.split for sample in self._present)
        return {split: counts[split] for split in SPLITS if counts[split]}

    def samples(self, split: str | None = None, *, labelled: bool = False) -> tuple[Sample, ...]:
        """Return the samples that have a row, in order; of one split, and with a label, if asked so."""
        return tuple(
            sample
            for sample in self._present
            if split in (None, sample.split) and not (labelled and sample.label is None)
        )

    def paths(self, split: str | None = None) -> list[str]:
        """Return one path a row of `arrays(split)`: the DATA argument joined with the relative path."""
        return [self.manifest.name_of(s) for s in self._rows_of(split)]

    def arrays(self, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return features float32 (N, D) and class indices int64 (N,) of a split, or of all.

        In labelled data, images without a label are left out; in unlabelled data every index is -1.

        Raises
        ------
        UsageError    no such split
        """
        if split is not None and split not in self.splits:
            raise UsageError(
                f"no split {split!r} with features in {self.manifest.name}",
                hint=f"found {', '.join(self.splits) or 'no features at all'}",
            )
        samples = self._rows_of(split)
        index = {name: number for number, name in enumerate(self.classes)}
        y = np.array([index.get(s.label or "", -1) for s in samples], dtype=np.int64)
        return self.read(samples), y

    def _rows_of(self, split: str | None) -> tuple[Sample, ...]:
        return self.samples(split, labelled=self.manifest.labelled)

    def read(self, samples: tuple[Sample, ...]) -> np.ndarray:
        """Return features float32 (N, D) of samples that have a row."""
        if not samples:
            return np.empty((0, self.feature_dim), np.float32)
        rows: np.ndarray = self._view.read([sample.key for sample in samples])
        return rows.astype(np.float32, copy=False)


def open_features(
    cache: Cache,
    dataset: str | None = None,
    *,
    space: str | None = None,
    backbone: str | None = None,
    layer: str | None = None,
) -> FeatureSet:
    """Find the cached features of a data set.

    Parameters
    ----------
    dataset : str
        Name, id or source path of a data set; the one extracted last when not given.
    space, backbone, layer : str
        Which space, where the data set has rows in several: the folder's name or a prefix, the backbone's name, the layer.

    Raises
    ------
    UsageError    nothing extracted yet, or what is asked for does not name one space
    """
    manifest = cache.read_dataset(dataset)
    if space is not None:
        found = FeatureSet(manifest, cache.find_space(space))
    else:
        found = _only_complete(cache, manifest, backbone, layer)
    found.space.mark_used()
    return found


def _only_complete(cache: Cache, manifest: Manifest, backbone: str | None, layer: str | None) -> FeatureSet:
    complete = [
        features
        for one in cache.spaces()
        if _fits(one, backbone, layer) and (features := FeatureSet(manifest, one)).splits and not features.missing
    ]
    latest = cache.latest() or {"spaces": []}
    newest = [f for f in complete if f.space.folder.name in latest["spaces"][:1]]
    if len(complete) == 1 or newest:
        return (newest or complete)[0]
    if complete:
        names = ", ".join(features.space.folder.name for features in complete)
        raise UsageError(
            f"{manifest.name} has features in {len(complete)} spaces: {names}", hint="name one with --space"
        )
    asked = "".join(f" and {kind} {name}" for kind, name in (("backbone", backbone), ("layer", layer)) if name)
    raise UsageError(
        f"no space holds the features of every image of {manifest.name}{asked and f' with{asked[4:]}'}",
        hint=f"run `embedpipe extract {manifest.sources[0].argument}`",
    )


def _fits(space: Space, backbone: str | None, layer: str | None) -> bool:
    name = f"{space.spec['source']}:{space.spec['architecture']}"
    named = backbone is None or backbone in (name, name.removeprefix("timm:"))
    return named and (layer is None or layer == space.spec["layer"])

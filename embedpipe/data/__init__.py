"""Data sets: folders, tables, tars, Parquet files, hf data sets and URLs as a manifest of samples, and the bytes of each image.

>>> manifest = read_manifest("data/", key_of=lambda place: sha256(place.read()).digest())
>>> manifest.samples[0].label
'cat'
"""

from embedpipe.data._folder import list_images
from embedpipe.data._labels import SEPARATOR, TASKS, join_names, names_of
from embedpipe.data._manifest import SPLITS, Manifest, Place, Sample, targets
from embedpipe.data._read import read_manifest
from embedpipe.data._source import Failure, Source, absolute_argument, is_source, root_of
from embedpipe.data._splits import components

__all__ = [
    "Failure",
    "Manifest",
    "Place",
    "SEPARATOR",
    "SPLITS",
    "Sample",
    "Source",
    "TASKS",
    "absolute_argument",
    "components",
    "is_source",
    "join_names",
    "list_images",
    "names_of",
    "read_manifest",
    "root_of",
    "targets",
]

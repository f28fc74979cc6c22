"""Data sets: folders, tables, tars, Parquet files, hf data sets and URLs as a manifest of samples, and the bytes of each image.

>>> manifest = read_manifest("data/", key_of=lambda place: sha256(place.read()).digest())
>>> manifest.samples[0].label
'cat'
"""

from embedpipe.data._folder import list_images
from embedpipe.data._labels import LABEL_SEPARATOR, TASK_OF_COLUMN, join_names, label_names
from embedpipe.data._manifest import SPLITS, ByteSource, Manifest, Sample, targets
from embedpipe.data._read import read_manifest
from embedpipe.data._source import Failure, Source, absolute_argument, is_data_argument, parse_root
from embedpipe.data._splits import connected_components, position

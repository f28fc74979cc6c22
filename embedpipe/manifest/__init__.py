"""Sources to samples: folders, tables, tar shards, Parquet files, hub data sets and URLs of them become a Manifest.

Any deed and the pipeline may enter; the cache imports the nouns. Nothing here opens an image or
imports torch: the content key of an image comes from the `key_of` function that the caller hands in.

>>> manifest = read_manifest(["data"], key_of=index.key_of)
>>> manifest.classes, manifest.splits
(('cat', 'dog'), {'train': 70, 'val': 15, 'test': 15})
"""

from embedpipe.manifest._folder import list_images
from embedpipe.manifest._read import read_manifest
from embedpipe.manifest._sample import SPLITS, Failure, Manifest, Sample
from embedpipe.manifest._source import Source, absolute_argument, is_source, root_of
from embedpipe.manifest._split import components
from embedpipe.manifest._targets import SEPARATOR, TASKS, join_names, names_of, targets

__all__ = ["SPLITS", "Failure", "Manifest", "Sample", "Source", "absolute_argument", "is_source"]
__all__ += [
    "SEPARATOR",
    "TASKS",
    "components",
    "join_names",
    "list_images",
    "names_of",
    "read_manifest",
    "root_of",
    "targets",
]

"""The feature cache: features of images, stored by the sha256 of the image files.

A cache folder holds spaces, data sets and `latest.json`. A space holds all features with one fingerprint, the sha256 of its
spec: everything that determines a feature, such as weights, layer, transform and precision.

Modules, each of which uses only those before it:

_sealed       HDF5 files with a checksum of their header; their structure is not trusted
_meta         the folder of a space: meta.json, and the lock of the writer
_features     feature files: rows, keys, failures, and a checksum of each MiB; a view of them reads a space without a lock
_space        a space, and its writer: shards, commits and merges
_datasets     sample tables: paths, labels, splits and groups
_cache        the cache folder
_index        a memo of image hashes
_export       export to one HDF5, NumPy or Parquet file
_verify       verification

>>> space = Cache(Path("cache")).open_space(spec)
>>> with space.writer(feature_dim=512, dtype="float32", environment={}, pins={}) as writer:
...     writer.append(keys, features)
...     writer.finish()
>>> space.view().read(keys)
"""

from embedpipe.cache._cache import Cache, measure, sweep_leftovers
from embedpipe.cache._datasets import dataset_name
from embedpipe.cache._export import Exported, export_writer
from embedpipe.cache._features import SpaceView
from embedpipe.cache._index import KeyIndex
from embedpipe.cache._meta import last_used
from embedpipe.cache._space import Space, SpaceWriter
from embedpipe.cache._verify import DAMAGE, Finding, verify_files, verify_latest, verify_space

"""The cache: features keyed by the bytes of their images, in spaces named by all that shapes them.

The only room that imports h5py. Deeds and the pipeline may enter; it imports only the nouns of
`manifest`, `errors` and `provenance`, and never torch.

>>> space = Cache(Path("cache")).open_space(spec, name="timm-resnet18")
>>> with space.writer(feature_dim=512, dtype="float32", environment={}, pins={}) as writer:
...     writer.append(keys, features)
...     writer.finish()
>>> space.view().read(keys)
"""

from embedpipe.cache._cache import Cache
from embedpipe.cache._caring import last_used, measure, sweep_leftovers
from embedpipe.cache._datasets import dataset_name
from embedpipe.cache._export import Exported, writer_of
from embedpipe.cache._index import KeyIndex
from embedpipe.cache._packing import Packing, try_packing
from embedpipe.cache._space import Space
from embedpipe.cache._verify import DAMAGE, Finding, prove_files, prove_latest, prove_space
from embedpipe.cache._view import SpaceView
from embedpipe.cache._writer import SpaceWriter

__all__ = [
    "DAMAGE",
    "Cache",
    "Exported",
    "Finding",
    "KeyIndex",
    "Packing",
    "Space",
    "SpaceView",
    "SpaceWriter",
    "dataset_name",
    "last_used",
    "measure",
    "prove_files",
    "prove_latest",
    "prove_space",
    "sweep_leftovers",
    "try_packing",
    "writer_of",
]

"""Places: where the bytes of one image are, and how they are read from there.

Any room may enter. A place in a local file (whole, or a range of its bytes) is read by any process; rows of Parquet files and
of `datasets`, and whatever a URL names, are read by the process that asks, with libraries that are imported then.

>>> Place("/data/cat.jpg").read()
>>> Place("/data/shard-000.tar", "1536+20480/cat/1.jpg").read()      # bytes 1536 to 22016 of that file
>>> Place("s3://bucket/train.parquet", "row 12:345 image").read()    # row 345 of row group 12
"""

from embedpipe.places._hub import HUB, forget_splits, open_split, parse_hub
from embedpipe.places._parquet import open_parquet
from embedpipe.places._place import Place, open_file
from embedpipe.places._remote import is_url, list_url

__all__ = [
    "HUB",
    "Place",
    "forget_splits",
    "is_url",
    "list_url",
    "open_file",
    "open_parquet",
    "open_split",
    "parse_hub",
]

"""Place: where the bytes of one image are, and how they are read.

>>> Place("/data/shard.tar", "512+1000/cat/1.jpg").read()  # 1000 bytes of a tar member
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from embedpipe.data._files import file_version, is_url, read_file
from embedpipe.data._hub import hub_version, read_hub_row
from embedpipe.data._parquet import read_parquet_row
from embedpipe.data._source import HUB

ROW = "row "


@dataclass(frozen=True)
class Place:
    """Where the bytes of one image are.

    Parameters
    ----------
    path : str    absolute path of a file, a URL, or hf:NAME[:CONFIG]/SPLIT
    part : str    where in it: "" the whole file, "OFFSET+SIZE" a range of bytes, "row GROUP:ROW COLUMN" of a Parquet file,
                  "row ROW COLUMN" of a split; optionally followed by "/NAME", which is only displayed
    """

    path: str
    part: str = ""

    @classmethod
    def of(cls, place: Place | str | os.PathLike[str]) -> Place:
        """Return that of a whole file by its path; a `Place` unchanged."""
        return place if isinstance(place, Place) else cls(os.path.abspath(place))

    def __str__(self) -> str:
        return f"{self.path}[{self.part}]" if self.part else self.path

    @property
    def is_remote(self) -> bool:
        """True unless it is a file of this machine."""
        return is_url(self.path) or self.path.startswith(HUB)

    @property
    def is_direct(self) -> bool:
        """True if it is a local file or a range of its bytes, which any process can read without a library."""
        return not self.is_remote and not self.part.startswith(ROW)

    def read(self) -> bytes:
        """Return the bytes.

        Raises
        ------
        OSError       the file cannot be read, or is shorter than it was
        UsageError    a library that reads the file is not installed
        """
        location = self.part.partition("/")[0]
        if self.path.startswith(HUB):
            return read_hub_row(self.path, location)
        if location.startswith(ROW):
            version = self.version() or f"of minute {time.monotonic() // 60}"
            return read_parquet_row(self.path, version, location)
        offset, size = map(int, location.split("+")) if location else (0, -1)
        data = read_file(self.path, offset, size)
        if size >= 0 and len(data) != size:
            raise OSError("changed while reading")
        return data

    def version(self) -> str | None:
        """Return a text that changes whenever the file, URL or split does; None if there is no such text.

        Raises
        ------
        OSError    the file or server cannot be reached
        """
        return hub_version(self.path) if self.path.startswith(HUB) else file_version(self.path)

"""Place: where the bytes of one image are.

>>> Place("/data/cat.jpg").read()
>>> Place("/data/shard-000.tar", "1536+20480").read()      # bytes 1536 to 22016 of that file
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One image's bytes.

    path : str    absolute path of a file
    part : str    where in the file they are: "" the whole file, "OFFSET+SIZE" a range of bytes
    """

    path: str
    part: str = ""

    @classmethod
    def of(cls, place: Place | str | os.PathLike[str]) -> Place:
        """Return a place as it is, and that of a file by its path."""
        return place if isinstance(place, Place) else cls(os.path.abspath(place))

    def __str__(self) -> str:
        return f"{self.path}[{self.part}]" if self.part else self.path

    def read(self) -> bytes:
        """Return the bytes.

        Raises
        ------
        OSError    the file cannot be read, or is shorter than it was
        """
        with open(self.path, "rb") as stream:
            if not self.part:
                return stream.read()
            offset, size = map(int, self.part.split("+"))
            stream.seek(offset)
            data = stream.read(size)
        if len(data) != size:
            raise OSError("changed while reading")
        return data

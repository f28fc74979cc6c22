"""Rows packed one by one: the first bytes of all their numbers, then the second ones, deflated. Lossless.

Zeros, which a ReLU leaves, all but vanish; the last bits of dense rows do not.

>>> unpack(pack(row), row.dtype, len(row))
"""

from __future__ import annotations

import time
import zlib
from typing import Any, NamedTuple

import numpy as np

from embedpipe.cache._structure import Bytes

LEVEL = 1  # higher ones gain little and take several times as long
Array = np.ndarray[Any, Any]


def pack(row: Array) -> Bytes:
    """Return a row (D,) as fewer bytes."""
    shuffled = row.view(np.uint8).reshape(-1, row.itemsize).T.tobytes()
    return np.frombuffer(zlib.compress(shuffled, LEVEL), np.uint8)


def unpack(packed: Bytes, dtype: np.dtype[Any], dim: int) -> Array:
    """Return the row (dim,) that was packed.

    Raises
    ------
    ValueError    these bytes are no such row
    """
    size = dim * dtype.itemsize
    try:
        raw = zlib.decompressobj().decompress(packed.tobytes(), size + 1)
    except zlib.error as exc:
        raise ValueError(str(exc)) from exc
    if len(raw) != size:
        raise ValueError(f"they hold {len(raw)} bytes or more, expected {size}")
    return np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, dim).T.copy().view(dtype).reshape(dim)


class Packing(NamedTuple):
    """What packing comes to: the share of its bytes that a row still takes, and the seconds to pack and unpack one."""

    share: float = 1.0
    pack_s: float = 0.0
    unpack_s: float = 0.0


def try_packing(rows: Array) -> Packing:
    """Pack and unpack some rows (n, D), and tell what it took."""
    start = time.perf_counter()
    packed = [pack(row) for row in rows]
    between = time.perf_counter()
    for one in packed:
        unpack(one, rows.dtype, rows.shape[1])
    end = time.perf_counter()
    share = sum(one.nbytes for one in packed) / max(1, rows.nbytes)
    return Packing(share, (between - start) / max(1, len(rows)), (end - between) / max(1, len(rows)))

"""compiled: a loop over numbers as machine code, kept on disk for the next process. The door to numba (extra `fused`).

>>> @compiled("void(float32[::1])")
... def double(x): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

OPTIONS = {"nogil": True, "fastmath": True, "boundscheck": False, "error_model": "numpy", "cache": True}

Loop = TypeVar("Loop", bound=Callable[..., None])


def compiled(signature: str) -> Callable[[Loop], Loop]:
    """Compile a loop for arguments of these types, when its file is first imported on a machine.

    Raises
    ------
    ImportError     numba is not installed
    RuntimeError    there is no folder to keep the machine code in
    """
    decorate: Callable[[Loop], Loop] = numba.njit(signature, **OPTIONS)
    return decorate

"""How hard to try. EMBEDPIPE_FAULTS=short (the default) takes seconds a test; `make faults` runs full."""

from __future__ import annotations

import os
from typing import TypeVar

CHOSEN = os.environ.get("EMBEDPIPE_FAULTS", "short")
assert CHOSEN in ("short", "full"), f"EMBEDPIPE_FAULTS is {CHOSEN!r}, expected short or full"
FULL = CHOSEN == "full"

T = TypeVar("T")


def tier(short: T, full: T) -> T:
    """Return what the chosen tier calls for."""
    return full if FULL else short

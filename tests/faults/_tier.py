"""How much of a proof runs: a few seconds of it by default, all of it with EMBEDPIPE_FAULTS=full."""

from __future__ import annotations

import os
from typing import TypeVar

Count = TypeVar("Count")
FULL = os.environ.get("EMBEDPIPE_FAULTS") == "full"


def tier(short: Count, full: Count) -> Count:
    """Return the count for the tier that runs."""
    return full if FULL else short

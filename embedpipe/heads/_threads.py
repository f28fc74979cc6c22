"""Threads of fitting: blocks of rows are computed in as many threads as torch has, each of them with single-threaded products.

The threads of OpenBLAS and of torch would otherwise wait for each other by spinning. Sums over blocks are added in the order of
the blocks, so results do not depend on the number of threads.

>>> with row_threads() as pool:
...     objective = BatchedObjective(problem, pool)
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def row_threads() -> Iterator[ThreadPoolExecutor | None]:
    """Limit BLAS and torch to one thread each, and yield a pool with the threads that torch had; None for one thread."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # also the number that new threads start with
    try:
        with threadpool_limits(1, "blas"):
            if count == 1:
                yield None
            else:
                with ThreadPoolExecutor(count) as pool:
                    yield pool
    finally:
        torch.set_num_threads(count)

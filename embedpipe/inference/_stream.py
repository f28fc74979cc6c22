"""stream_rows: decode and forward at the same time, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from embedpipe.data import Place
from embedpipe.images import LIMITS, Limits, image_batches
from embedpipe.inference._runner import Rows, Runner
from embedpipe.inference._settings import torch_threads


def stream_rows(items: Iterable[tuple[bytes, Place | Path]], runner: Runner, limits: Limits = LIMITS) -> Iterator[Rows]:
    """Decode and forward images, a few batches at a time, as they are ready: a slow image holds up no other.

    Yields
    ------
    Rows    of at most `handed` images from one backbone, for each backbone in turn
    """
    forward = runner.settings
    batches: Any = image_batches(
        items, runner.windows, batch_size=forward.handed, workers=forward.workers, in_order=False, limits=limits
    )
    under_way: deque[Future[list[Rows]]] = deque()
    threads = ThreadPoolExecutor(forward.streams, thread_name_prefix="forward")
    with torch_threads(forward.threads):
        try:
            for batch in batches:
                under_way.append(threads.submit(runner.rows_of, batch))
                while under_way and (under_way[0].done() or len(under_way) > 2 * forward.streams):
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        finally:
            batches.close()
            threads.shutdown(wait=True, cancel_futures=True)

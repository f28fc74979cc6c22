"""settle: choose executor and batch size by measurement, and prove that the executor agrees with eager torch."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedpipe.data import Place
from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, StorageError, UsageError
from embedpipe.images import image_batches
from embedpipe.inference._openvino import graph_name, has_openvino
from embedpipe.inference._runner import Runner
from embedpipe.inference._settings import FIRST_BATCH, Forward, torch_threads
from embedpipe.storage import publish

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

AGREEMENT = 1e-4  # of the largest feature; executors differ by 1e-6
LEAST_WORK = 100  # images; fewer are not worth a measurement
LARGEST_BATCH = 1024
WORTH_GROWING = 1.05  # of the rate with half the batch


@dataclass(frozen=True)
class Cost:
    """What an executor costs to start (s), and what share of eager's time it saves."""

    warm_up_s: float
    gain: float


# Before anything is measured. OpenVINO: 3 to 6 s, saves 15 to 60 %; torch.compile on a GPU: a minute, 10 to 20 %.
EXPECTED = {"openvino": Cost(6.0, 0.3), "compile": Cost(60.0, 0.15)}


def settle(
    backbones: Sequence[Backbone],
    forward: Forward,
    items: Iterable[tuple[bytes, Place | Path]],
    *,
    work: int,
    graphs: Path | None = None,
) -> Runner:
    """Return a runner under definite settings: `forward` may leave the executor to us ("auto"), and a batch size of 0.

    An executor is taken where the work ahead is worth its warm-up, and where its features agree with eager torch on a
    first batch; where one that was asked for by name does not agree, a warning says so and eager is taken.

    Parameters
    ----------
    items : iterable of (key, place)    images to measure with; only the first batch is read
    work : int                          images ahead

    Raises
    ------
    UsageError    the executor cannot do what is asked for
    """
    wanted = forward.executor
    if forward.device != "cpu" and not forward.batch_size:
        forward = replace(forward, batch_size=_find_batch(backbones, forward))
    eager = Runner(backbones, forward.under("eager"))
    if wanted == "auto" and work < LEAST_WORK:
        return eager
    name = _candidate(eager) if wanted == "auto" else wanted
    if name == "eager":
        return eager
    if name == "openvino" and (forward.precision, forward.device) != ("fp32", "cpu"):
        raise UsageError(
            f"--executor {name} with --precision {forward.precision} on {forward.device}, expected fp32 on cpu",
            hint="leave out one of them",
        )
    sample = _sample(eager, items, max(eager.forward.batch_size, forward.under(name).batch_size))
    eager_s, reference = _timed(eager, sample)
    memo = graphs / f"{graph_name(eager.joints)}-{name}.json" if graphs else None
    known, ahead_s = _recall(memo) or EXPECTED[name], work * eager_s / forward.streams
    if wanted == "auto" and ahead_s * known.gain < known.warm_up_s:
        return eager
    start, eager_s = time.monotonic(), _timed(eager, sample)[0]  # now that it is warm
    try:
        other = Runner(backbones, forward.under(name), graphs=graphs)
        _, found = _timed(other, sample)
    except EmbedpipeError:
        raise
    except Exception as exc:  # noqa: BLE001  converters raise anything for a model that they do not know
        _warn(f"{name} cannot run {backbones[0].name}: {' '.join(str(exc).split())[:200]}")
        return eager
    other_s, _ = _timed(other, sample)
    other.difference = largest_difference(reference, found)
    cost = Cost(time.monotonic() - start - other_s * other.forward.batch_size, 1 - other_s / eager_s)
    if memo:
        with suppress(StorageError):  # kept only to save time
            publish(memo, json.dumps(vars(cost)).encode())
    if other.difference > AGREEMENT:
        _warn(
            f"{name} differs from eager torch by {other.difference:.1e} of the largest feature, expected at most {AGREEMENT:g}"
        )
        return eager
    return eager if wanted == "auto" and cost.gain <= 0 else other


def _warn(reason: str) -> None:
    warnings.warn(f"{reason}; eager torch is used", EmbedpipeWarning, stacklevel=3)


def _candidate(eager: Runner) -> str:
    """Return the executor that may be faster than eager torch here."""
    forward = eager.forward
    if forward.device.startswith("cuda"):
        return "compile"
    if (forward.device, forward.precision) != ("cpu", "fp32"):
        return "eager"
    return "openvino" if has_openvino() else "eager"


def _sample(runner: Runner, items: Iterable[tuple[bytes, Place | Path]], size: int) -> list[np.ndarray]:
    """Return the first `size` images, those that can be read, for each window; black ones to fill them up."""
    batches = image_batches(islice(items, size), runner.windows, batch_size=size, workers=runner.forward.workers)
    found = [batch for batch in batches if batch.keys]
    return runner.pad(found[0].images, size) if found else runner.examples(size)


def _timed(runner: Runner, images: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Return the seconds an image, and the features, of the first batch."""
    batch = [one[: runner.forward.batch_size] for one in images]
    with torch_threads(runner.forward.threads):
        start = time.monotonic()
        features = runner(batch)
        return (time.monotonic() - start) / len(batch[0]), features


def largest_difference(reference: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the largest difference of the features found, as a share of the largest feature of their backbone."""
    pairs = [(old[: len(new)], new[: len(old)]) for old, new in zip(reference, found, strict=True)]
    tiny = np.finfo(np.float32).tiny
    return max(float(np.abs(new - old).max() / max(np.abs(old).max(), tiny)) for old, new in pairs)


def _recall(memo: Path | None) -> Cost | None:
    """Return what was measured before, None where nothing was."""
    with suppress(OSError, ValueError, TypeError):
        return Cost(**json.loads(memo.read_text())) if memo else None
    return None


def find_batch(rate: Callable[[int], float], first: int) -> int:
    """Return the batch size from which doubling is not worth it.

    Parameters
    ----------
    rate : size -> images/s    raises MemoryError where a batch does not fit
    first : int                size to begin with; halved until one fits

    Raises
    ------
    MemoryError    not even one image fits
    """
    size = first
    while True:
        try:
            best = rate(size)
            break
        except MemoryError:
            if size == 1:
                raise
            size //= 2
    while first <= size <= LARGEST_BATCH // 2:
        try:
            larger = rate(2 * size)
        except MemoryError:
            break
        if larger < WORTH_GROWING * best:
            break
        size, best = 2 * size, larger
    return size


def _find_batch(backbones: Sequence[Backbone], forward: Forward) -> int:
    def rate(size: int) -> float:
        runner = Runner(backbones, replace(forward, executor="eager", batch_size=size))
        images = runner.examples()
        return 1 / min(_timed(runner, images)[0] for _ in range(4))  # the first of them warms up

    return find_batch(rate, FIRST_BATCH)

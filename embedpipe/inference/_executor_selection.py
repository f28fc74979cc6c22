"""select_executor: the executor and the batch size that are expected to finish the images first.

What executors took is recorded beside the converted graphs, for each model, processor, device and precision, and later
runs choose by it. The features of another executor are compared with those of eager torch before it is used.

>>> runner = select_executor([backbone], settings, items, work=3000)
>>> runner.settings.executor, runner.settings.batch_size
('openvino', 2)
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpipe.errors import EmbedpipeError, StorageError, UsageError, warn
from embedpipe.images import image_batches
from embedpipe.inference._openvino import graph_name, has_openvino
from embedpipe.inference._runner import Item, Runner
from embedpipe.inference._settings import FIRST_BATCH, InferenceSettings, count_cores, torch_threads
from embedpipe.provenance import fingerprint
from embedpipe.storage import write_atomic

if TYPE_CHECKING:
    from embedpipe.backbones import Backbone

Records = dict[str, dict[str, list[float]]]  # executor -> "warm_up_s", "run_s", "trial_s" -> the last measurements

AGREEMENT = 1e-4  # of the largest feature; executors differ by 1e-6
LEAST_WORK = 100  # images; fewer are not worth a measurement
LEAST_CALLS = 8  # of a run whose speed is recorded: 64 images on a CPU
ROUNDS, TRIAL_S = 5, 2.0  # of a trial
REMEMBERED = 5  # measurements of each kind
LARGEST_BATCH = 1024
WORTH_GROWING = 1.05  # of the rate with half the batch
FORMAT = 2
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")
# Warm-up in seconds and the expected share of eager's time that is saved, before anything is measured.
PRIORS = {"openvino": (6.0, 0.3), "compile": (60.0, 0.15)}
NARROW_GAIN = 0.05  # of openvino without AVX-512, where it is about as fast as eager


def select_executor(
    backbones: Sequence[Backbone],
    settings: InferenceSettings,
    items: Iterable[Item],
    *,
    work: int,
    agreement: float = AGREEMENT,
) -> Runner:
    """Return a runner whose executor and batch size are chosen; `settings` may leave them open ("auto" and 0).

    Where another executor than eager cannot run the model, or its features differ from those of eager torch, a warning
    says so and eager is used.

    Parameters
    ----------
    items : iterable of (key, place)    images to measure with; only the first batch is read
    work : int                          number of images to compute
    agreement : float                   largest allowed difference from eager, as a share of the largest feature

    Raises
    ------
    UsageError    the executor does not support this precision or device
    """
    if settings.device != "cpu" and not settings.batch_size:
        settings = replace(settings, batch_size=_find_batch(backbones, settings))
    if settings.executor == "openvino" and (settings.precision, settings.device) != ("fp32", "cpu"):
        got = f"--executor openvino with --precision {settings.precision} on {settings.device}"
        raise UsageError(f"{got}, expected fp32 on cpu", hint="leave out one of them")
    eager = Runner(backbones, settings.under("eager"))
    memo, name, trial = _memo_of(eager), settings.executor, False
    sample = functools.cache(functools.partial(_sample, eager, items))
    if name == "auto":
        name, trial = _choose(eager, read_records(memo), sample, work)
    if name == "eager":
        return eager
    start = time.monotonic()
    try:
        other = Runner(backbones, settings.under(name))
        other.difference = largest_difference(_call(eager, sample()), _call(other, sample()))
    except EmbedpipeError:
        raise
    except Exception as exc:  # noqa: BLE001  converters raise anything for a model that they do not know
        _warn(f"{name} cannot run {backbones[0].name}: {' '.join(str(exc).split())[:200]}")
        return eager
    record(memo, name, "warm_up_s", time.monotonic() - start)
    if other.difference > agreement:
        _warn(
            f"{name} differs from eager torch by {other.difference:.1e} of the largest feature, expected at most {agreement:g}"
        )
        return eager
    if trial:
        seconds = measure([eager, other], sample())
        for runner, image_s in zip((eager, other), seconds, strict=True):
            record(memo, runner.settings.executor, "trial_s", image_s)
        other = other if seconds[1] < seconds[0] else eager
    other.image_s.clear()  # only images of the run itself count
    return other


def choose_executor(records: Records, work: int, streams: int, candidate: str) -> str | None:
    """Return the executor expected to finish `work` images first; None where eager or `candidate` has no record.

    Expected: warm-up + work * seconds per image / streams, with the medians of the last runs, or of the last trials where
    one of the two has not run yet.
    """
    for kind in ("run_s", "trial_s"):
        expected_s = {
            name: median(known.get("warm_up_s", [0.0])) + work * median(known[kind]) / streams
            for name, known in records.items()
            if kind in known
        }
        if {"eager", candidate} <= expected_s.keys():
            return min(expected_s, key=expected_s.__getitem__)
    return None


def is_trial_worth(eager_s: float, work: int, streams: int, *, warm_up_s: float, gain: float) -> bool:
    """Return True if the time that an executor is expected to save exceeds its warm-up.

    Parameters
    ----------
    eager_s : float    seconds per image in one stream
    gain : float       expected share of eager's time that the executor saves
    """
    return work * eager_s / streams * gain > warm_up_s


def measure(runners: Sequence[Runner], images: Sequence[np.ndarray], *, rounds: int = ROUNDS) -> list[float]:
    """Return the seconds per image of each runner with all streams busy: medians of rounds in which they take turns.

    No round begins after `TRIAL_S`.
    """
    settings, seconds, begun = runners[0].settings, [list[float]() for _ in runners], time.monotonic()
    with torch_threads(settings.threads), ThreadPoolExecutor(settings.streams) as streams:
        while not seconds[0] or (len(seconds[0]) < rounds and time.monotonic() - begun < TRIAL_S):
            for runner, rounds_s in zip(runners, seconds, strict=True):
                start = time.monotonic()
                list(streams.map(runner, [images] * settings.streams))
                rounds_s.append((time.monotonic() - start) / len(images[0]))
    return [median(rounds_s) for rounds_s in seconds]


def record_run(runner: Runner) -> None:
    """Record the speed of a run that has computed enough images; later runs choose their executor by it."""
    if len(runner.image_s) >= LEAST_CALLS:
        record(_memo_of(runner), runner.settings.executor, "run_s", median(runner.image_s))


def record(memo: Path | None, executor: str, kind: str, seconds: float) -> None:
    """Add a measurement of an executor to a file of records; a failure to write costs time only."""
    if memo:
        records = read_records(memo)
        known = records.setdefault(executor, {})
        known[kind] = [*known.get(kind, []), seconds][-REMEMBERED:]
        with suppress(StorageError):
            write_atomic(memo, json.dumps({"format": FORMAT, "executors": records}).encode())


def read_records(memo: Path | None) -> Records:
    """Return the recorded measurements; none where the file is absent, damaged or of another format."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        stored: Any = json.loads(memo.read_text()) if memo else {}
        if stored.get("format") == FORMAT:
            return {
                executor: {kind: [float(one) for one in seconds] for kind, seconds in known.items() if seconds}
                for executor, known in stored["executors"].items()
            }
    return {}


def _choose(eager: Runner, records: Records, sample: Callable[[], list[np.ndarray]], work: int) -> tuple[str, bool]:
    """Return an executor, and whether it has to be compared with eager first."""
    streams, candidate = eager.settings.streams, _candidate(eager.settings)
    known = choose_executor(records, work, streams, candidate)
    if known or candidate == "eager" or work < LEAST_WORK:
        return known or "eager", False
    of_eager = records.get("eager", {})
    recorded = of_eager.get("run_s") or of_eager.get("trial_s")
    warm_up_s, gain = PRIORS[candidate]
    if candidate == "openvino" and "avx512f" not in _processor():
        gain = NARROW_GAIN
    warm_up_s = median(records.get(candidate, {}).get("warm_up_s", [warm_up_s]))
    eager_s = median(recorded) if recorded else measure([eager], sample(), rounds=3)[0]
    trial = is_trial_worth(eager_s, work, streams, warm_up_s=warm_up_s, gain=gain)
    return (candidate, True) if trial else ("eager", False)


def _candidate(settings: InferenceSettings) -> str:
    """Return the executor that may be faster than eager torch on this device."""
    if settings.device.startswith("cuda"):
        return "compile"
    return "openvino" if has_openvino() and (settings.device, settings.precision) == ("cpu", "fp32") else "eager"


def _memo_of(runner: Runner) -> Path | None:
    """Return the file of what was measured of these models on this processor, device and precision."""
    settings = runner.settings
    what = [graph_name(runner.shared_models), _processor(), count_cores(), settings.device, settings.precision]
    return settings.graphs / f"{fingerprint(what)[:24]}.json" if settings.graphs else None


@functools.cache
def _processor() -> tuple[str, ...]:
    """Return the model of the processor and those of its vector instructions that matter."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return (fields.get("model name", platform.machine()), *(flag for flag in FLAGS if flag in flags))


def _sample(runner: Runner, items: Iterable[Item]) -> list[np.ndarray]:
    """Return the first readable images, one batch for each window, filled up with black ones."""
    size = runner.settings.batch_size
    batches = image_batches(islice(items, size), runner.windows, batch_size=size, workers=runner.settings.workers)
    readable = [batch for batch in batches if batch.keys]
    return runner.pad(readable[0].images) if readable else runner.examples()


def _call(runner: Runner, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    with torch_threads(runner.settings.threads):
        return runner(images)


def _warn(reason: str) -> None:
    warn(f"{reason}; eager torch is used")


def largest_difference(reference: Sequence[np.ndarray], features: Sequence[np.ndarray]) -> float:
    """Return the largest difference of features, as a share of the largest reference feature of their backbone."""
    tiny = np.finfo(np.float32).tiny
    pairs = zip(reference, features, strict=True)
    return max(float(np.abs(new - old).max() / max(np.abs(old).max(), tiny)) for old, new in pairs)


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
    with suppress(MemoryError):
        while first <= size <= LARGEST_BATCH // 2 and (larger := rate(2 * size)) >= WORTH_GROWING * best:
            size, best = 2 * size, larger
    return size


def _find_batch(backbones: Sequence[Backbone], settings: InferenceSettings) -> int:
    def rate(size: int) -> float:
        runner = Runner(backbones, replace(settings, executor="eager", batch_size=size))
        for _ in range(4):  # the first call warms up
            _call(runner, runner.examples())
        return 1 / min(runner.image_s)

    return find_batch(rate, FIRST_BATCH)

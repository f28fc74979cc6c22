"""Streams, batch sizes and the choice of an executor. Sessions here are small stubs of the seam, backbones random ones."""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedpipe.backbones import Backbone, at_layer, load_backbone
from embedpipe.errors import EmbedpipeWarning, UsageError
from embedpipe.images import Limits, Transform, image_batches
from embedpipe.inference import InferenceSettings, Rows, Runner, resolve_settings, select_executor, stream_rows
from embedpipe.inference._executor_selection import find_batch, record, record_run

FORWARD = InferenceSettings(batch_size=4, workers=2, streams=2)


@pytest.fixture
def backbone() -> Backbone:
    return load_backbone("timm:test_resnet", weights="none")


@pytest.fixture
def items(tmp_path: Path) -> list[tuple[bytes, Path]]:
    """Fourteen noisy images."""
    found = []
    for i in range(14):
        pixels = np.random.default_rng(i).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        found.append((hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).digest(), tmp_path / f"{i}.png"))
    return found


def rows_by_key(stream: list[Rows], backbone: int = 0) -> dict[bytes, bytes]:
    return {
        key: row.tobytes()
        for rows in stream
        if rows.backbone == backbone
        for key, row in zip(rows.keys, rows.features, strict=True)
    }


class Stub:
    """A device: one batch at a time, `seconds` each, without holding a core; it fits `most` images."""

    def __init__(self, *, seconds: float = 0.0, most: int = 1000, width: int = 96) -> None:
        self.seconds, self.most, self.width = seconds, most, width
        self.sizes: list[int] = []
        self._device = threading.Lock()

    def __call__(self, shared_model: int, images: np.ndarray) -> list[np.ndarray]:
        with self._device:
            self.sizes.append(len(images))
            if len(images) > self.most:
                raise MemoryError("does not fit")
            time.sleep(self.seconds)
            means = images.reshape(len(images), -1).mean(1, dtype=np.float32)
            return [np.repeat(means[:, None], self.width, 1)]


def test_any_order_gives_the_same_bits(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    runner = Runner([backbone], FORWARD)
    first = rows_by_key(list(stream_rows(items, runner)))
    assert set(first) == {key for key, _ in items}
    assert rows_by_key(list(stream_rows(items[::-1], runner))) == first
    assert rows_by_key(list(stream_rows(items[5:], Runner([backbone], FORWARD)))) == {k: first[k] for k, _ in items[5:]}


def test_several_backbones_share_one_decode(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    other = load_backbone("timm:test_efficientnet", weights="none")
    backbones = [backbone, at_layer(backbone, "layer2"), other]
    runner = Runner(backbones, FORWARD)
    assert len(runner.windows) == len({backbone.transform.geometry, other.transform.geometry})  # type: ignore[attr-defined]
    stream = list(stream_rows(items, runner))
    for n, one in enumerate(backbones):
        alone = rows_by_key(list(stream_rows(items, Runner([one], FORWARD))))
        found = rows_by_key(stream, n)
        assert set(found) == set(alone)
        for key, row in alone.items():
            np.testing.assert_allclose(np.frombuffer(found[key], "f4"), np.frombuffer(row, "f4"), rtol=0, atol=1e-5)


def test_views_are_other_pixels_of_the_same_model(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    assert isinstance(backbone.transform, Transform)
    views = [replace(backbone, transform=replace(backbone.transform, augment="strong", view=n)) for n in (1, 2)]
    runner = Runner([backbone, *views], FORWARD)
    assert (len(runner.shared_models), len(runner.windows)) == (1, 3)
    stream = list(stream_rows(items, runner))
    found = [rows_by_key(stream, n) for n in range(3)]
    for key, _ in items:
        assert len({rows[key] for rows in found}) == 3


def test_the_search_for_a_fault_leaves_the_model_to_other_threads(
    backbone: Backbone, items: list[tuple[bytes, Path]]
) -> None:
    """It sets hooks and a memory format, and another thread may compute with the model."""
    with torch.no_grad():
        backbone.module.model.get_parameter("layer4.0.bn1.weight")[0] = float("nan")
    runner = Runner([backbone], replace(FORWARD, channels_last=True))
    model = runner.shared_models[0].extractor.model
    before = {name: (value.data_ptr(), value.stride()) for name, value in model.named_parameters()}
    failures = [failure for rows in stream_rows(items, runner) for failure in rows.failures]
    assert {reason.partition(" is")[0] for _, _, reason in failures} == {"the output of layer 'layer4.0.bn1'"}
    assert {name: (value.data_ptr(), value.stride()) for name, value in model.named_parameters()} == before


def test_a_slow_image_holds_up_no_other(backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "slow.png")
    start, when, others = time.monotonic(), [], 3 * items
    runner = Runner([backbone], replace(FORWARD, batch_size=2))
    for rows in stream_rows([(b"slow", tmp_path / "slow.png"), *others], runner, Limits(time_s=8.0)):
        when += [time.monotonic() - start] * len(rows.keys)
    assert len(when) == len(others)
    assert sorted(when)[7] < 7.5  # what was ready did not wait until the slow one was given up


def test_small_batches_are_handed_on_together(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    """Eight images or one larger batch; rows are the same to the bit, since the backbone sees the same batches."""
    found = {}
    for size in (2, 3, 16):
        runner = Runner([backbone], replace(FORWARD, batch_size=size, load=8))
        many = list(stream_rows(3 * items, runner))
        assert {len(rows.keys) for rows in many[:-1]} == {{2: 8, 3: 6, 16: 16}[size]}
        found[size] = rows_by_key(many)
    alone = Runner([backbone], replace(FORWARD, batch_size=2))
    for batch in image_batches(items, alone.windows, batch_size=2, workers=1):
        for rows in alone.rows_of(batch):
            for key, row in zip(rows.keys, rows.features, strict=True):
                assert found[2][key] == row.tobytes()


def test_a_batch_size_that_was_asked_for_is_what_is_handed_on() -> None:
    assert resolve_settings(device="cpu", workers=1, batch_size=2).handed == 2
    assert resolve_settings(device="cpu", workers=1, batch_size="auto").under("openvino").handed == 8


def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(
    backbone: Backbone, items: list[tuple[bytes, Path]]
) -> None:
    small, large = Stub(most=1), Stub()
    found = rows_by_key(list(stream_rows(items, Runner([backbone], FORWARD, session=small))))
    assert found == rows_by_key(list(stream_rows(items, Runner([backbone], FORWARD, session=large))))
    assert len(found) == len(items)
    assert small.sizes.count(4) <= 2  # by both streams; then they know
    assert set(large.sizes) == {4}


def test_a_device_that_holds_not_one_image_is_an_error(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    with pytest.raises(MemoryError):
        list(stream_rows(items, Runner([backbone], FORWARD, session=Stub(most=0))))


def test_torch_threads_are_set_back(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in stream_rows(items, Runner([backbone], FORWARD)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_threads_leave_when_the_reader_stops_early(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    stream = stream_rows(items, Runner([backbone], FORWARD))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "forward"))]


@pytest.mark.parametrize(
    ("fits", "best", "found"), [(1000, 256, 256), (5000, 10_000, 1024), (200, 10_000, 128), (40, 10_000, 32), (1, 1, 1)]
)
def test_the_batch_size_is_found_by_doubling(fits: int, best: int, found: int) -> None:
    def rate(size: int) -> float:
        if size > fits:
            raise MemoryError
        return float(min(size, best))

    assert find_batch(rate, 64) == found


def test_no_batch_size_fits() -> None:
    def rate(size: int) -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        find_batch(rate, 64)


def choose(
    backbone: Backbone,
    items: list[tuple[bytes, Path]],
    graphs: Path,
    *,
    work: int,
    executor: str = "auto",
    **options: float,
) -> Runner:
    return select_executor([backbone], replace(FORWARD, executor=executor, graphs=graphs), items, work=work, **options)


def test_little_work_is_done_by_eager_torch(
    backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path
) -> None:
    runner = choose(backbone, items, tmp_path / "graphs", work=14)
    assert runner.settings.executor == "eager"
    assert not (tmp_path / "graphs").exists()


def records_in(graphs: Path) -> Any:
    (memo,) = graphs.glob("*.json")
    return json.loads(memo.read_text())["executors"]


def test_a_trial_chooses_for_much_work_and_is_recorded(
    backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path
) -> None:
    graphs = tmp_path / "graphs"
    runner = choose(backbone, items, graphs, work=10_000_000)
    records = records_in(graphs)
    assert records["openvino"]["warm_up_s"][0] > 0
    faster = min(("eager", "openvino"), key=lambda name: records[name]["trial_s"][0])
    assert runner.settings.executor == faster


@pytest.mark.parametrize(("eager_s", "expected"), [(0.1, "openvino"), (0.01, "eager")])
def test_recorded_runs_choose_without_a_trial(
    backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path, eager_s: float, expected: str
) -> None:
    choose(backbone, items, tmp_path, work=1, executor="openvino")
    (memo,) = tmp_path.glob("*.json")
    record(memo, "eager", "run_s", eager_s)
    record(memo, "openvino", "run_s", 0.02)
    before = records_in(tmp_path)
    assert choose(backbone, items, tmp_path, work=10_000).settings.executor == expected
    after = records_in(tmp_path)
    tried = len(after["openvino"]["warm_up_s"]) - len(before["openvino"]["warm_up_s"])
    assert (after["eager"], tried) == (before["eager"], int(expected == "openvino"))


def test_a_run_records_its_speed_for_the_next(
    backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path
) -> None:
    graphs = tmp_path / "graphs"
    runner = choose(backbone, items, graphs, work=14, executor="eager")
    list(stream_rows(items, runner))
    record_run(runner)
    assert not graphs.exists()  # four calls are too few
    list(stream_rows(3 * items, runner))
    record_run(runner)
    assert records_in(graphs) == {"eager": {"run_s": [statistics.median(runner.image_s)]}}


def test_an_executor_asked_for_by_name_is_checked(
    backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path
) -> None:
    runner = choose(backbone, items, tmp_path, work=1, executor="openvino")
    assert runner.settings.executor == "openvino"
    assert 0 < runner.difference < 1e-5
    with pytest.warns(EmbedpipeWarning, match="openvino differs from eager torch by"):
        other = choose(backbone, items, tmp_path, work=1, executor="openvino", agreement=runner.difference / 2)
    assert other.settings.executor == "eager"


class Unconvertible(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not images.is_meta and torch.jit.is_tracing():
            raise RuntimeError("not to be traced")
        return images.mean((2, 3))


def test_a_model_that_cannot_be_converted_runs_in_eager_torch(items: list[tuple[bytes, Path]], tmp_path: Path) -> None:
    odd = load_backbone(Unconvertible(), transform=Transform((16, 16), 16))
    with pytest.warns(EmbedpipeWarning, match="openvino cannot run"):
        assert choose(odd, items, tmp_path, work=1, executor="openvino").settings.executor == "eager"


def test_another_precision_is_refused(backbone: Backbone, items: list[tuple[bytes, Path]]) -> None:
    forward = replace(FORWARD, executor="openvino", precision="bf16")
    with pytest.raises(UsageError, match="expected fp32 on cpu"):
        select_executor([backbone], forward, items, work=1)


def test_no_warning_when_all_is_well(backbone: Backbone, items: list[tuple[bytes, Path]], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(backbone, items, tmp_path, work=1, executor="openvino")


def test_a_plan_has_a_stream_a_core() -> None:
    plan = resolve_settings(device="cpu", batch_size="auto", workers="auto")
    assert plan.streams * plan.threads >= 1
    assert (plan.batch_size, plan.executor) == (0, "auto")
    assert (plan.definite.executor, plan.definite.batch_size) == ("eager", 4)
    assert plan.under("openvino").batch_size == 2

"""The choice of an executor, as a pure function of what was measured: seconds an image in one of two streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedpipe.inference._executor_selection import REMEMBERED, choose_executor, is_trial_worth, read_records, record

# (warm-up, seconds an image and stream) as measured on two machines with two streams
AVX2 = {
    "resnet18": {"eager": (0.0, 2 / 29), "openvino": (4.0, 2 / 28), "compile": (35.0, 2 / 29.5)},
    "lite0": {"eager": (0.0, 2 / 46), "openvino": (4.0, 2 / 44), "compile": (50.0, 2 / 46.5)},
    "resnet50": {"eager": (0.0, 2 / 12), "openvino": (6.0, 2 / 12.5), "compile": (40.0, 2 / 12.1)},
    "vit_small": {"eager": (0.0, 2 / 13), "openvino": (5.0, 2 / 14), "compile": (30.0, 2 / 13.2)},
}
AVX512 = {"lite0": {"eager": (0.0, 2 / 122), "openvino": (4.0, 2 / 263)}}


def records_of(costs: dict[str, tuple[float, float]], kind: str = "run_s") -> dict[str, dict[str, list[float]]]:
    return {
        name: {**({"warm_up_s": [warm_up_s]} if warm_up_s else {}), kind: [image_s]}
        for name, (warm_up_s, image_s) in costs.items()
    }


@pytest.mark.parametrize("work", [100, 700, 3000])
@pytest.mark.parametrize(
    "costs", [*AVX2.values(), *AVX512.values()], ids=[*AVX2, *(f"{name}, AVX-512" for name in AVX512)]
)
def test_the_executor_that_ends_first_is_chosen(costs: dict[str, tuple[float, float]], work: int) -> None:
    expected = {name: warm_up_s + work * image_s / 2 for name, (warm_up_s, image_s) in costs.items()}
    chosen = choose_executor(records_of(costs), work, 2, "openvino")
    assert chosen is not None
    assert expected[chosen] == min(expected.values())


def test_the_choice_depends_on_the_work() -> None:
    records = records_of(AVX512["lite0"])
    assert choose_executor(records, 100, 2, "openvino") == "eager"
    assert choose_executor(records, 2500, 2, "openvino") == "openvino"
    slow_start = records_of({**AVX2["resnet18"], "compile": (35.0, 2 / 40)})
    assert [choose_executor(slow_start, work, 2, "openvino") for work in (700, 10_000)] == ["eager", "compile"]


def test_one_noisy_measurement_does_not_change_the_choice() -> None:
    records = records_of(AVX512["lite0"])
    records["eager"]["run_s"] *= 3
    records["openvino"]["run_s"] = [2 / 263, 2 / 263, 2 / 60]
    assert choose_executor(records, 2500, 2, "openvino") == "openvino"


def test_runs_and_trials_are_not_compared_with_each_other() -> None:
    """In a run decoders take cores as well, so that the same executor is slower than in a trial."""
    records = records_of(AVX512["lite0"], "trial_s")
    records["openvino"]["run_s"] = [2 / 100]
    assert choose_executor(records, 2500, 2, "openvino") == "openvino"


def test_nothing_is_chosen_before_both_were_measured() -> None:
    for missing in ("eager", "openvino"):
        records = records_of(AVX512["lite0"])
        del records[missing]
        assert choose_executor(records, 2500, 2, "openvino") is None
    assert choose_executor({}, 2500, 2, "openvino") is None


@pytest.mark.parametrize(
    ("eager_s", "work", "gain", "worth"),
    [
        (2 / 122, 2500, 0.3, True),  # lite0, AVX-512: saves 6.1 s of 20.5 s
        (2 / 122, 700, 0.3, False),
        (2 / 29, 3000, 0.05, False),  # resnet18, AVX2: saves 5 s of 103 s
        (2 / 12, 3000, 0.05, True),
    ],
)
def test_a_trial_has_to_be_worth_its_warm_up(eager_s: float, work: int, gain: float, worth: bool) -> None:
    assert is_trial_worth(eager_s, work, 2, warm_up_s=6.0, gain=gain) == worth


def test_the_last_measurements_are_kept(tmp_path: Path) -> None:
    memo = tmp_path / "graphs" / "memo.json"
    for seconds in range(REMEMBERED + 2):
        record(memo, "eager", "run_s", float(seconds))
    assert read_records(memo) == {"eager": {"run_s": [float(n) for n in range(2, REMEMBERED + 2)]}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{",
        '{"warm_up_s": 1.0, "gain": 0.5}',
        '{"format": 2, "executors": {"eager": {"run_s": ["x"]}}}',
    ],
)
def test_files_of_another_format_count_as_absent(tmp_path: Path, content: str) -> None:
    memo = tmp_path / "memo.json"
    memo.write_text(content)
    assert read_records(memo) == {}
    record(memo, "eager", "run_s", 1.0)
    assert json.loads(memo.read_text())["executors"] == {"eager": {"run_s": [1.0]}}


def test_a_folder_that_refuses_costs_time_only() -> None:
    record(Path("/proc/no/memo.json"), "eager", "run_s", 1.0)
    assert read_records(Path("/proc/no/memo.json")) == {}

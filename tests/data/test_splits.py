"""The stable split: known positions, nothing moves or is torn apart, classes are covered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpipe.data import Manifest, Sample, read_manifest
from embedpipe.data._splits import assign_splits, position


def key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def u(identity: str) -> float:
    """The position, by exact integers and not by the code under test."""
    return int(hashlib.sha256(b"split0" + identity.encode()).hexdigest(), 16) / 2**256


def sample(text: str, label: str | None = "a", *, split: str = "", group: str | None = None):
    return Sample(text, label, split, group, key(text))


def split(samples, val: float = 0.15, test: float = 0.15) -> tuple[dict[str, str], list[str]]:
    found, warnings = assign_splits(samples, val_fraction=val, test_fraction=test)
    assert [s.path for s in found] == [s.path for s in samples]
    return {s.path: s.split for s in found}, warnings


MANY = [sample(f"{i}.png", "ab"[i % 2]) for i in range(400)]


def test_thresholds_test_first_then_val() -> None:
    found, warnings = split(MANY, val=0.2, test=0.1)
    for s in MANY:
        at = u(s.key.hex())
        assert found[s.path] == ("test" if at < 0.1 else "val" if at < 0.3 else "train")
    assert warnings == []


def test_a_known_position_is_fixed_for_ever() -> None:
    assert position("patient-7") == pytest.approx(0.996956717569708, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 10_000), min_size=60), st.sets(st.integers(0, 10_000)))
def test_growing_the_data_moves_nothing(first: set[int], more: set[int]) -> None:
    def samples(numbers: set[int]) -> list[Sample]:
        return [sample(str(n), "ab"[n % 2]) for n in sorted(numbers)]

    before, warned = split(samples(first))
    after, _ = split(samples(first | more))
    if not warned:
        assert {path: after[path] for path in before} == before


def test_a_group_and_its_duplicates_stay_together() -> None:
    samples = [sample(f"{i}", "ab"[i % 2], group=f"g{i % 40}") for i in range(200)]
    copies = [
        Sample("copy", "a", "", None, samples[0].key),  # no group, same content as one of g0
        Sample("link", "a", "", "g1", samples[2].key),  # ties g1 to g2
    ]
    found, _ = split(samples + copies)
    for group in range(40):
        assert len({found[s.path] for s in samples if s.group == f"g{group}"}) == 1
    assert found["copy"] == found["0"]
    assert found["link"] == found["1"] == found["2"]


def test_a_component_stands_where_its_lowest_member_stands() -> None:
    ties = []
    for i in range(40):
        ties += [sample(f"l{i}", group=f"left{i}"), sample(f"r{i}", group=f"right{i}")]
        ties.append(Sample(f"tie{i}", "b", "", f"left{i}", key(f"r{i}")))
    found, _ = split(MANY + ties)
    for i in range(40):
        at = min(u(f"left{i}"), u(f"right{i}"))
        assert found[f"tie{i}"] == ("test" if at < 0.15 else "val" if at < 0.3 else "train")


def test_duplicates_land_on_one_side() -> None:
    twins = [Sample(f"twin-{s.path}", s.label, "", None, s.key) for s in MANY]
    found, _ = split([*MANY, *twins])
    assert all(found[s.path] == found[f"twin-{s.path}"] for s in MANY)


def test_unlabelled_samples_are_all() -> None:
    assert split([sample("x", None), sample("y", None)])[0] == {"x": "all", "y": "all"}


def test_val_is_carved_from_train_and_test_is_not_invented() -> None:
    named = [sample(f"{i}", "ab"[i % 2], split="train") for i in range(200)]
    found, warnings = split(named, val=0.2)
    assert found == {s.path: "val" if u(s.key.hex()) < 0.2 else "train" for s in named}
    assert warnings == []
    tests = [sample(f"t{i}", split="test") for i in range(20)]
    found, _ = split(named + tests, val=0.2)
    assert {found[s.path] for s in tests} == {"test"}
    assert {found[s.path] for s in named} == {"train", "val"}


def test_named_splits_stand() -> None:
    named = [sample("1", split="train"), sample("2", "b", split="val"), sample("3", split="val")]
    assert split(named) == ({"1": "train", "2": "val", "3": "val"}, [])
    only_test = [sample("1", split="test"), sample("2", "b", split="test")]
    assert set(split(only_test)[0].values()) == {"test"}


def test_a_class_lacking_val_takes_the_nearest() -> None:
    in_train = [s for i in range(99) if u((s := sample(f"r{i}", "rare")).key.hex()) >= 0.3][:5]
    found, warnings = split([*MANY, *in_train])
    nearest = min(in_train, key=lambda s: u(s.key.hex()))
    assert [s.path for s in in_train if found[s.path] == "val"] == [nearest.path]
    assert "without a val image" in warnings[0]
    assert "rare" in warnings[0]


def test_a_class_lacking_train_takes_the_nearest() -> None:
    in_test = [s for i in range(99) if u((s := sample(f"r{i}", "rare")).key.hex()) < 0.15][:4]
    found, warnings = split([*MANY, *in_test])
    ordered = sorted(in_test, key=lambda s: u(s.key.hex()), reverse=True)
    assert found[ordered[0].path] == "train"
    assert found[ordered[1].path] == "val"
    assert {found[s.path] for s in ordered[2:]} == {"test"}
    assert len(warnings) == 2


def test_two_images_become_one_train_and_one_val() -> None:
    for i in range(30):
        found, _ = split([*MANY, sample(f"p{i}", "pair"), sample(f"q{i}", "pair")])
        assert sorted([found[f"p{i}"], found[f"q{i}"]]) == ["train", "val"]


def test_one_image_goes_to_train_with_a_warning() -> None:
    for i in range(20):
        found, warnings = split([*MANY, sample(f"s{i}", "single")])
        assert found[f"s{i}"] == "train"
        assert len(warnings) == 1
        assert "one image" in warnings[0]
        assert "single" in warnings[0]


def test_covering_one_class_does_not_uncover_another() -> None:
    shared = [sample(f"{label}{i}", label, group=f"g{i}") for label in "xy" for i in range(2)]
    for fraction in (0.05, 0.3, 0.6):
        found, _ = split(shared, val=fraction, test=0.0)
        for label in "xy":
            assert {found[f"{label}{i}"] for i in range(2)} == {"train", "val"}


def test_no_val_is_forced_where_none_is_wanted() -> None:
    found, warnings = split(MANY, val=0.0, test=0.2)
    assert set(found.values()) == {"train", "test"}
    assert warnings == []


def test_splits_ignore_names_and_order(tmp_path: Path) -> None:
    """The same contents under other names and labels, read in another order: the same split."""

    def write(root: Path, name: str) -> Manifest:
        for i in range(120):
            path = root / f"{'ab'[i % 2]}{name}" / f"{name}{i * 7919 % 120}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(f"content {i}"))
        return read_manifest([root], key_of=lambda p: hashlib.sha256(p.read()).digest())

    one, two = write(tmp_path / "one", "x"), write(tmp_path / "two", "y")
    assert {s.key: s.split for s in one.samples} == {s.key: s.split for s in two.samples}

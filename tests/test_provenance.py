"""Canonical JSON, fingerprints and digests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedpipe.errors import CacheBusy, EmbedpipeError
from embedpipe.provenance import canonical_json, differing_fields, digest_arrays, fingerprint, nearest


def test_the_order_of_keys_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": [1.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def test_digests_cover_names_dtypes_shapes_and_bytes() -> None:
    base = {"w": np.arange(6, dtype=np.float32)}
    others = [
        {"v": base["w"]},
        {"w": base["w"].astype(np.float64)},
        {"w": base["w"].reshape(2, 3)},
        {"w": base["w"] + 1},
        {"w": base["w"], "b": np.empty(0, np.float32)},
    ]
    digests = [digest_arrays(named) for named in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_arrays({"w": torch.arange(6, dtype=torch.float32)}) == digests[0]
    two = {"w": base["w"], "a": np.ones(2)}
    assert digest_arrays(two) == digest_arrays(dict(reversed(two.items())))
    strided = np.arange(12, dtype=np.float32).reshape(6, 2)[:, 0]
    assert digest_arrays({"w": strided}) == digest_arrays({"w": strided.copy()})
    assert digest_arrays({"w": torch.tensor(1.0, dtype=torch.bfloat16)}) != digest_arrays(
        {"w": torch.tensor(2.0, dtype=torch.bfloat16)}
    )


def test_errors_have_two_parents_and_keep_their_attributes() -> None:
    busy = CacheBusy("found a writer, expected none", hint="wait", pid=7)
    assert isinstance(busy, BlockingIOError)
    assert isinstance(busy, EmbedpipeError)
    assert (busy.pid, busy.exit_code) == (7, 75)  # type: ignore[attr-defined]
    assert str(busy) == "found a writer, expected none; wait"


def test_nearest() -> None:
    assert nearest("resnet81", ["resnet18", "vgg11"])[0] == "resnet18"
    assert nearest("qqqq", ["resnet18"]) == []


def test_differing_fields_are_dotted_with_old_and_new_values() -> None:
    old = {"a": 1, "t": {"size": (96, 96), "mean": [0.5]}, "gone": None, "w": "0" * 64}
    new = {"a": 1.0, "t": {"size": [64, 64], "mean": [0.5]}, "w": "f" * 64}
    assert [str(one) for one in differing_fields(old, new)] == [
        "a: 1 -> 1.0",  # their fingerprints differ too
        "gone: null -> (absent)",
        "t.size: [96, 96] -> [64, 64]",
        f"w: {'0' * 12} -> {'f' * 12}",
    ]
    assert differing_fields(old, {**old, "t": {"size": [96, 96], "mean": [0.5]}}) == []

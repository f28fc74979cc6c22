"""Options that were removed: a warning where nothing changes, an error where something would."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from embedpipe.errors import EmbedpipeWarning, UsageError, check_pixels_option, check_removed_option

REMOVED: dict[str, Any] = {"harmless": (0.0,), "reason": "activations are trained on as they are"}


def test_a_removed_option_that_is_not_given_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_removed_option("--noise", None, **REMOVED)


def test_a_value_that_changes_nothing_is_a_warning() -> None:
    with pytest.warns(EmbedpipeWarning, match="--noise is no longer used: activations are trained on as they are"):
        check_removed_option("--noise", 0.0, **REMOVED)


def test_a_value_that_no_longer_exists_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"--noise 0.1 was removed: .*; expected no --noise or --noise 0.0") as raised:
        check_removed_option("--noise", 0.1, **REMOVED)
    assert raised.value.hint == "leave --noise out"
    with pytest.raises(UsageError, match="was removed"):
        check_removed_option("--executor", "fused", reason="openvino is faster", hint="use --executor openvino")


def test_a_warning_names_the_line_of_the_caller() -> None:
    with pytest.warns(EmbedpipeWarning, match="--pixels is no longer used") as caught:
        check_pixels_option("exact")
    assert caught[0].filename == __file__

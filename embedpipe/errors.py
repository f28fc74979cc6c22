"""The error tree. Anyone may raise and catch these; the command line turns them into one line and an exit code.

::

    EmbedpipeError                    1   (Exception)
    ├── UsageError                    2   (ValueError)        a wrong argument, path, name or data layout
    ├── DecodeError                   1   (ValueError)        an image that its decoder refuses; never ends a run
    ├── NonFiniteFeatures             1   (ArithmeticError)   NaN or inf where a feature should be
    ├── WeightsUnavailable            1   (LookupError)       no network and no such weights
    ├── CacheMismatch                 4   (ValueError)        the cache holds something else than was asked for
    ├── ModelMismatch                 4   (ValueError)        weights or a stored model of another architecture
    ├── Stopped                       5   (RuntimeError)      SIGTERM; resumable
    ├── Interrupted                 130   (RuntimeError)      SIGINT; resumable
    ├── StorageError                 74   (OSError)           disk full, permission, input/output
    └── CacheBusy                    75   (BlockingIOError)   somebody else holds the lock

    EmbedpipeWarning                      (UserWarning)       odd, but the work goes on

A message says what was found and what was expected, the hint what to do. Facts that a caller needs are attributes.

>>> raise UsageError("no layer 'layer9' in timm:resnet18", hint="did you mean 'layer4'?")
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from typing import Any


class EmbedpipeError(Exception):
    """Base of all errors of embedpipe.

    Parameters
    ----------
    message : str    what was found and what was expected, one line, no full stop
    hint : str       what to do, one line
    **facts          values that a caller needs, such as the `rows` that are not finite, kept as attributes
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        self.message, self.hint = message, hint
        self.__dict__.update(facts)
        super().__init__(message)

    @property
    def code(self) -> str:
        """The name that the JSON envelope carries."""
        return type(self).__name__

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(EmbedpipeError, ValueError):
    exit_code = 2


class DecodeError(EmbedpipeError, ValueError):
    """An image that its decoder refuses."""


class NonFiniteFeatures(EmbedpipeError, ArithmeticError):
    """NaN or inf in features."""


class WeightsUnavailable(EmbedpipeError, LookupError):
    """Weights that are neither on this machine nor can be downloaded."""


class CacheMismatch(EmbedpipeError, ValueError):
    exit_code = 4


class ModelMismatch(EmbedpipeError, ValueError):
    exit_code = 4


class Stopped(EmbedpipeError, RuntimeError):
    exit_code = 5


class Interrupted(EmbedpipeError, RuntimeError):
    exit_code = 130


class StorageError(EmbedpipeError, OSError):
    exit_code = 74


class CacheBusy(EmbedpipeError, BlockingIOError):
    exit_code = 75


class EmbedpipeWarning(UserWarning):
    """Base of all warnings of embedpipe."""


def warn(text: str) -> None:
    """Issue an `EmbedpipeWarning` at the line outside this package that called it."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_back and frame.f_globals["__name__"].startswith("embedpipe."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, EmbedpipeWarning, stacklevel=level)


def check_removed_option(
    flag: str, value: object, *, harmless: Collection[object] = (), reason: str, hint: str = ""
) -> None:
    """Warn about an option that no longer has an effect, or refuse a value that no longer exists.

    The parameter of a removed option stays in the signature for one version, with None as its default.

    Parameters
    ----------
    flag : str           as a user types it, such as "--pixels"
    value : object       what the user passed; None: nothing, so nothing happens
    harmless : values    those that ask for what happens anyway
    reason : str         what happens now, a clause that follows a colon
    hint : str           what to do; default: leave the option out

    Raises
    ------
    UsageError    `value` is not None and not harmless
    """
    if value in harmless:
        warn(f"{flag} is no longer used: {reason}")
    elif value is not None:
        expected = " or ".join([f"no {flag}", *(f"{flag} {one}" for one in harmless)])
        raise UsageError(f"{flag} {value} was removed: {reason}; expected {expected}", hint=hint or f"leave {flag} out")


def check_pixels_option(pixels: str | None) -> None:
    """Warn where `pixels` is "exact", raise UsageError where it is "fast"."""
    check_removed_option(
        "--pixels",
        pixels,
        harmless=("exact",),
        reason="images are always resized exactly, by Pillow or to the same bits",
    )

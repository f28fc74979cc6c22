"""The command line, with one module per command. Exit codes and error messages are set here.

>>> main(["extract", "data/", "--json"])
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import rich_click as click

from embedpipe.cli._build import COMMAND, WARNINGS, CommandGroup, print_envelope, shared_options
from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, Interrupted, Stopped, StorageError, UsageError

# fmt: off
COMMANDS = (
    "extract", "fit-head", "finetune", "predict", "evaluate", "compare", "audit", "advise", "export", "cache", "models",
    "layers", "demo",
)
# fmt: on


class Commands(CommandGroup):
    """The top group, which imports the module of a command when the command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        stem = name.replace("-", "_")
        command: click.Command = getattr(import_module(f"embedpipe.cli.{stem}"), stem)
        return command


class Defect(EmbedpipeError):
    """An exception that no command should raise; it is shown with its traceback."""


@click.version_option(package_name="embedpipe", message="embedpipe %(version)s")
@click.group(
    cls=Commands,
    params=[*shared_options()],
    context_settings={"auto_envvar_prefix": "EMBEDPIPE", "help_option_names": ["-h", "--help"]},
)
def embedpipe(**_: Any) -> None:
    """Cache the features of a frozen backbone once, train heads on them in seconds, fine-tune from there.

    Example: `embedpipe extract data/ && embedpipe fit-head && embedpipe predict RUN new/`
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of its result or error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # for file names that are not UTF-8
    _handle_signals()
    _show_warnings("-v" in arguments or "--verbose" in arguments)
    COMMAND.clear()
    try:
        sys.exit(embedpipe.main(args=arguments, prog_name="embedpipe", standalone_mode=False) or 0)
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001  # every error becomes an exit code
        if isinstance(exc, Stopped | Interrupted | KeyboardInterrupt | click.Abort):
            for number in (signal.SIGTERM, signal.SIGINT):  # a later signal must not change the exit code
                signal.signal(number, signal.SIG_IGN)
        sys.exit(_report(exc, "--json" in arguments))


def _handle_signals() -> None:
    """Stop the command at the first signal; while it commits its work, ignore others but a third Ctrl-C."""
    received = 0

    def handle(signum: int, frame: Any) -> None:
        nonlocal received
        received += 1
        if received == 1 and signum == signal.SIGTERM:
            hint = "run the same command to continue"
            raise Stopped("stopped by SIGTERM; finished work is committed", hint=hint)
        if signum == signal.SIGINT and received != 2:
            raise KeyboardInterrupt
        click.echo("committing finished work; press Ctrl-C again to exit at once", err=True)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _show_warnings(verbose: bool) -> None:
    """Print warnings of embedpipe as they are raised, and those of libraries if `verbose`."""
    WARNINGS.clear()
    warnings.simplefilter("default" if verbose else "ignore")
    warnings.simplefilter("always", EmbedpipeWarning)

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, EmbedpipeWarning):
            WARNINGS.append(str(message))
        click.echo(f"warning: {message}", err=True)

    warnings.showwarning = show


def _report(exc: BaseException, as_json: bool) -> int:
    """Print an error on one line of stderr, and in the JSON envelope; return its exit code."""
    error = _as_error(exc)
    if as_json:
        with contextlib.suppress(OSError):
            print_envelope(error=error)
    if isinstance(error, Defect):
        traceback.print_exception(exc)
    with contextlib.suppress(OSError):
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
    return error.exit_code


def _as_error(exc: BaseException) -> EmbedpipeError:
    """Return an exception as an error of embedpipe, which has an exit code, a message and a hint."""
    if isinstance(exc, click.Abort | KeyboardInterrupt):
        return Interrupted("interrupted; finished work is committed", hint="run the same command to continue")
    if isinstance(exc, click.ClickException):
        context = getattr(exc, "ctx", None)
        hint = f"see `{context.command_path} --help`" if context else ""
        return UsageError(exc.format_message().rstrip("."), hint=hint)
    if isinstance(exc, EmbedpipeError):
        return exc
    if isinstance(exc, OSError):
        message = f"{exc.filename or 'input/output'}: {exc.strerror or exc}"
        return StorageError(message, hint="check the disk and the permissions")
    return Defect(f"{type(exc).__name__}: {exc}", hint="please report this with the lines above")

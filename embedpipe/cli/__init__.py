"""The command line: one file a command, each a short body over a deed. Exit codes and errors are set here.

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

from embedpipe.cli._build import COMMAND, WARNINGS, Verbs, describe_error, print_envelope, shared_options
from embedpipe.errors import EmbedpipeError, EmbedpipeWarning, Interrupted, Stopped, StorageError, UsageError

COMMANDS = (
    "extract",
    "fit-head",
    "finetune",
    "predict",
    "evaluate",
    "compare",
    "audit",
    "advise",
    "export",
    "cache",
    "models",
    "layers",
    "demo",
)
HELP = """Features of a frozen backbone, computed once and cached; heads in seconds; fine-tuning from there.

Example: `embedpipe extract data/ && embedpipe fit-head && embedpipe predict RUN new/`
"""


class Commands(Verbs):
    """The group: a command's file is imported when the command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            stem = name.replace("-", "_")
            found: click.Command = getattr(import_module(f"embedpipe.cli.{stem}"), stem)
            return found
        return None


def _group() -> click.Group:
    group = Commands(
        name="embedpipe",
        help=HELP,
        params=[*shared_options()],
        context_settings={"auto_envvar_prefix": "EMBEDPIPE", "help_option_names": ["-h", "--help"]},
    )
    return click.version_option(package_name="embedpipe", message="embedpipe %(version)s")(group)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the documented code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names that are no UTF-8
    _listen_to_signals()
    _listen_to_warnings("-v" in arguments or "--verbose" in arguments)
    as_json = "--json" in arguments
    COMMAND.clear()
    try:
        sys.exit(_group().main(args=arguments, prog_name="embedpipe", standalone_mode=False) or 0)
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001  # the border: every end has a code
        if isinstance(exc, Stopped | Interrupted | KeyboardInterrupt | click.Abort):
            for number in (
                signal.SIGTERM,
                signal.SIGINT,
            ):  # the code is decided; Python forgets handlers on its way out
                signal.signal(number, signal.SIG_IGN)
        sys.exit(_report(exc, as_json))


def _listen_to_signals() -> None:
    """Let the first signal stop the work; later ones find it committing what was done, and only a third Ctrl-C breaks that."""
    heard = 0

    def hear(signum: int, frame: Any) -> None:
        nonlocal heard
        heard += 1
        if heard == 1 and signum == signal.SIGTERM:
            raise Stopped("stopped by SIGTERM; what was done is committed", hint="run the same command to go on")
        if signum == signal.SIGINT and heard != 2:
            raise KeyboardInterrupt
        click.echo("committing what is done; Ctrl-C once more leaves at once", err=True)

    signal.signal(signal.SIGTERM, hear)
    signal.signal(signal.SIGINT, hear)


def _listen_to_warnings(verbose: bool) -> None:
    """Show our own warnings as they come, and those of libraries on demand."""
    WARNINGS.clear()
    warnings.simplefilter("default" if verbose else "ignore")
    warnings.simplefilter("always", EmbedpipeWarning)

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, EmbedpipeWarning):
            WARNINGS.append(str(message))
        click.echo(f"warning: {message}", err=True)

    warnings.showwarning = show


def _report(exc: BaseException, as_json: bool) -> int:
    """Say what went wrong in one line, on stderr and in the envelope, and return the exit code."""
    exit_code, error = _describe(exc)
    if as_json:
        with contextlib.suppress(OSError):
            print_envelope(" ".join(COMMAND), error=error)
    if error["code"] == "Defect":
        traceback.print_exception(exc)
    line = f"{error['message']}; {error['hint']}" if error["hint"] else error["message"]
    with contextlib.suppress(OSError):
        click.echo(f"error: {' '.join(line.split())}", err=True)
    return exit_code


def _describe(exc: BaseException) -> tuple[int, dict[str, str]]:
    if isinstance(exc, click.Abort | KeyboardInterrupt):
        exc = Interrupted("interrupted; what was done is committed", hint="run the same command to go on")
    elif isinstance(exc, click.ClickException):
        exc = UsageError(exc.format_message().rstrip("."), hint=_help_hint(exc))
    elif isinstance(exc, OSError) and not isinstance(exc, EmbedpipeError):
        exc = StorageError(
            f"{exc.filename or 'input/output'}: {exc.strerror or exc}", hint="check the disk and the permissions"
        )
    if isinstance(exc, EmbedpipeError):
        return exc.exit_code, describe_error(exc)
    message = f"{type(exc).__name__}: {exc}"
    return 1, {"code": "Defect", "message": message, "hint": "please report this with the lines above"}


def _help_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    return f"see `{context.command_path} --help`" if context else ""

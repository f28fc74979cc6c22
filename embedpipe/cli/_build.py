"""Commands of the command line, made from Python functions: their options, help and printed results.

The options of a command are the keyword-only parameters of its command function, and the shared ones. Its body calls the
function and prints the result:

>>> @command(extraction.extract, example="embedpipe extract data/ --backbone timm:resnet50")
... @click.argument("data", nargs=-1, required=True)
... def extract(session, data, **options):
...     summary = extraction.extract(data, **options).summary
...     session.finish(summary, format_summary(summary), failed=summary["failed"])
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import rich_click as click
from click.core import ParameterSource
from click.exceptions import Exit

from embedpipe.config import SHARED, Option, check_value, options_of, parameter_helps, read_config, suggest
from embedpipe.errors import EmbedpipeError, UsageError

PRESENTATION = ("json", "quiet", "verbose")  # shared options that command functions do not take
LOG_S = 5.0  # between two lines of progress where there is no terminal
WARNINGS: list[str] = []  # those of this process, for the JSON envelope
COMMAND: list[str] = []  # the words of the command, such as cache ls


@dataclass
class Session:
    """What the body of a command needs of the terminal: a progress bar, and printing of its result."""

    json: bool
    quiet: bool
    _bar: Any = field(default=None, repr=False)
    _logged: float = field(default_factory=time.monotonic, repr=False)

    def progress(self, label: str, done: int, total: int) -> None:
        """Draw a progress bar on a terminal; elsewhere print a line every few seconds."""
        if self.quiet or not total:
            return
        if sys.stderr.isatty():
            self._draw(label, done, total)
        elif time.monotonic() - self._logged > LOG_S:
            self._logged = time.monotonic()
            click.echo(f"{label}: {done} of {total}", err=True)

    def _draw(self, label: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        if self._bar is None:
            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        tasks = {task.description: task.id for task in self._bar.tasks}
        task = tasks[label] if label in tasks else self._bar.add_task(label, total=total)
        self._bar.update(task, completed=done, total=total)

    def close(self) -> None:
        """Remove the progress bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """Print a message that is not part of the result to stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    def finish(
        self,
        data: Mapping[str, Any],
        text: str,
        *,
        failed: Sequence[Mapping[str, str]] = (),
        error: EmbedpipeError | None = None,
    ) -> None:
        """Print the result as JSON (`data`) or as `text`; exit with the code of `error`, or with 3 if samples failed."""
        self.close()
        for failure in failed:
            self.note(f"failed: {failure['path']} ({failure['stage']}): {failure['reason']}")
        if self.json:
            print_envelope(data=data, error=error)
        elif text:
            click.echo(text)
        if error:
            click.echo(f"error: {error}", err=True)
            raise Exit(error.exit_code)
        if failed:
            raise Exit(3)


def print_envelope(*, data: Mapping[str, Any] | None = None, error: EmbedpipeError | None = None) -> None:
    """Print the JSON object that is the last line of stdout."""
    body: dict[str, Any] = {}
    if error:
        body["error"] = {"code": error.code, "message": error.message, "hint": error.hint}
    if data is not None:
        body["data"] = data
    click.echo(json.dumps({"schema": 1, "command": " ".join(COMMAND), "ok": not error, **body, "warnings": WARNINGS}))


class CommandGroup(click.RichGroup):
    """A group of commands that suggests the nearest name for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args and args[0] not in names:
            kind = " ".join([*COMMAND, "command"])
            raise UsageError(f"no {kind} {args[0]!r}", hint=suggest(args[0], names))
        COMMAND.extend(args[:1])
        return super().resolve_command(ctx, args)


class OptionType(click.ParamType[Any]):
    """A click type that converts a text to the annotation of an option."""

    name = "value"

    def __init__(self, option: Option) -> None:
        self.option = option

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if self.option.has_optional_value and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        return check_value(self.option, value)

    def get_metavar(self, param: Any, ctx: Any) -> str:
        return _metavar(self.option.annotation)


def _metavar(annotation: Any) -> str:
    """Return what a help text shows for a value: INT, FLOAT, TEXT, or the choices, joined by |."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    parts = [part for part in get_args(annotation) if part not in (type(None), bool)]
    if not parts:
        return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")
    return "|".join(sorted({_metavar(part) for part in parts}, key=str.isupper))


def _click_option(option: Option) -> click.Option:
    flag, kinds = "--" + option.name.replace("_", "-"), (option.annotation, *get_args(option.annotation))
    settings: dict[str, Any] = {"type": OptionType(option), "default": option.default}
    if option.annotation is bool:
        flag = f"{flag}/--no-{flag[2:]}" if option.default else flag
        settings = {"is_flag": True, "default": option.default, "show_default": True}
    elif any(get_origin(kind) is tuple for kind in kinds):
        settings = {"multiple": True, "type": str, "default": ()}
    elif option.has_optional_value:
        settings |= {"is_flag": False, "flag_value": "true", "default": "false"}
    else:
        settings["show_default"] = option.default is not None
    return click.Option([flag], help=option.help, **settings)


def shared_options() -> list[click.Option]:
    """Return the options that may stand before or after any command."""
    return [
        click.Option(["--cache-dir"], default="cache", show_default=True, help="Folder of the feature cache."),
        click.Option(["--runs-dir"], default="runs", show_default=True, help="Folder of the runs."),
        click.Option(
            ["--config"], is_eager=True, callback=_load_config, expose_value=False, help="YAML file with options."
        ),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Seed of all random numbers."),
        click.Option(["--json"], is_flag=True, help="Print the result as one JSON object."),
        click.Option(["--quiet"], is_flag=True, help="Print only results and errors."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Also show the warnings of libraries."),
    ]


def command(function: Callable[..., Any] | None, *, example: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a body (session, arguments, **options), with the options and help of a command function.

    Parameters
    ----------
    function : callable or None    gives the options and the help; None: the docstring of the body is the help
    example : str                  the command line at the end of the help
    """

    def make(body: Callable[..., None]) -> click.Command:
        options = options_of(function) if function else ()

        @click.pass_context
        def run(ctx: click.Context, /, **values: Any) -> None:
            _check_environment(ctx)
            shared = {name: _shared_value(ctx, name) for name in (*SHARED, *PRESENTATION)}
            taken = {option.name: shared[option.name] for option in options if option.name in shared}
            values = {name: value for name, value in values.items() if name not in shared}
            session = Session(shared["json"], shared["quiet"])
            ctx.call_on_close(session.close)
            body(session, **values, **taken)

        doc = (function or body).__doc__ or ""
        helps, params = parameter_helps(doc), list(reversed(getattr(body, "__click_params__", [])))
        paragraphs = [doc.strip().split("\n    Parameters")[0].strip()]
        paragraphs += [
            f"{p.human_readable_name}: {helps[p.name]}"
            for p in params
            if p.name in helps and p.param_type_name == "argument"
        ]
        return click.RichCommand(
            name=body.__name__.replace("_", "-"),
            callback=run,
            help="\n\n".join([*paragraphs, f"Example: `{example}`"]),
            params=[*params, *(_click_option(o) for o in options if o.name not in SHARED), *shared_options()],
        )

    return make


def _shared_value(ctx: click.Context, name: str) -> Any:
    """Return the value of a shared option: flag over environment over YAML over default, nearer contexts over outer ones."""
    contexts = [context for context in _with_parents(ctx) if name in context.params]
    for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
        for context in contexts:
            if context.get_parameter_source(name) is source:
                return context.params[name]
    return contexts[0].params[name]


def _check_environment(ctx: click.Context) -> None:
    """Raise UsageError for an environment variable with the prefix of this command that is none of its options."""
    prefix = f"{ctx.auto_envvar_prefix}_"
    known = [f"{prefix}{(param.name or '').upper()}" for param in ctx.command.params]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known:
            raise UsageError(f"unknown environment variable {name}", hint=suggest(name, known))


def _with_parents(ctx: click.Context | None) -> list[click.Context]:
    """Return a context and those above it, the nearest first."""
    return [ctx, *_with_parents(ctx.parent)] if ctx else []


def _commands(ctx: click.Context, group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Return the commands of a group and its groups, by what a user types: `extract`, `cache ls`."""
    found: dict[str, click.Command] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            found |= _commands(ctx, command, f"{prefix}{name} ")
        elif command is not None:
            found[f"{prefix}{name}"] = command
    return found


def _load_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Make the settings of a YAML file click's defaults, below flags and environment variables."""
    if not value:
        return
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    repeatable = {
        name: {p.name or "": p.multiple for p in command.params if isinstance(p, click.Option)}
        for name, command in _commands(root, root.command).items()
    }
    shared, sections = read_config(Path(value), repeatable)
    tree: dict[str, Any] = dict(shared)
    for name, section in sections.items():
        group, _, leaf = name.rpartition(" ")
        (tree.setdefault(group, {}) if group else tree)[leaf] = section
    for context in reversed(_with_parents(ctx)[:-1]):
        tree = {**shared, **tree.get(context.info_name or "", {})}
    ctx.default_map = tree


METRICS = {  # the metric with an interval, the titles of its column and of two others
    "accuracy": ("accuracy", "macro F1", "log loss"),
    "mean_average_precision": ("mean AP", "macro F1", "log loss"),
    "r2": ("R2", "MAE", "RMSE"),
}


def _number(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.4f}"


def format_scores(metrics: Mapping[str, Mapping[str, Any]], chosen_on: str | None = None) -> str:
    """Return a table of metrics, one row per split; the split that the head was chosen on is marked by *."""
    main = next((name for values in metrics.values() for name in METRICS if name in values), "accuracy")
    title, *others = METRICS[main]
    lines = [f"{'split':<6} {'n':>6} {title:>9}  {'95 % interval':<16}" + "".join(f" {other:>9}" for other in others)]
    for split, values in metrics.items():
        interval = values[f"{main}_ci95"] and "{:.4f} - {:.4f}".format(*values[f"{main}_ci95"])
        name = f"{split}*" if split == chosen_on else split
        cells = "".join(f" {_number(values[other.lower().replace(' ', '_')])}" for other in others)
        lines.append(f"{name:<6} {values['n']:>6} {_number(values[main])}  {interval or '-':<16}{cells}")
    if chosen_on in metrics:
        lines.append(f"* {chosen_on} was used to make this head: scores on new images may be lower")
    return "\n".join(lines)


def format_worst_classes(found: Mapping[str, Any] | None) -> str:
    """Return a table of the worst classes, or "" if the report has none."""
    if not found:
        return ""
    width = max(len("worst classes"), *(len(values["class"]) for values in found["classes"]))
    lines = [f"\n{'worst classes':<{width}} {'n':>6} {'precision':>9} {'recall':>7}  {'95 % interval':<16} {'F1':>7}"]
    for values in found["classes"]:
        interval = "{:.4f} - {:.4f}".format(*values["recall_ci95"])
        lines.append(
            f"{values['class']:<{width}} {values['n']:>6} {_number(values['precision'])} {values['recall']:>7.4f}  "
            f"{interval:<16} {values['f1']:>7.4f}"
        )
    return "\n".join(lines)

"""How a command is made from a deed: its options from the signature, the shared options, and what it prints.

>>> @command(extraction.extract, example="embedpipe extract data/ --backbone timm:resnet50")
... @click.argument("data", nargs=-1, required=True)
... def extract(session, data, **options): ...
"""

from __future__ import annotations

import functools
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

from embedpipe.config import SHARED, Option, check_value, options_of, parameter_helps, read_config
from embedpipe.errors import EmbedpipeError, UsageError
from embedpipe.provenance import nearest

PRESENTATION = ("json", "quiet", "verbose")
LOG_SECONDS = 5.0
WARNINGS: list[str] = []  # of this process's one command, for the envelope
COMMAND: list[str] = []  # its words, such as cache ls


@dataclass
class Session:
    """What a command body needs of the terminal: progress, and a place for its result."""

    command: str
    json: bool = False
    quiet: bool = False
    _bar: Any = field(default=None, repr=False)
    _logged: float = field(default_factory=time.monotonic, repr=False)

    def progress(self, label: str, done: int, total: int) -> None:
        """Draw a bar on a terminal; elsewhere log a line every few seconds."""
        if self.quiet or not total:
            return
        if sys.stderr.isatty():
            self._draw(label, done, total)
        elif time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            click.echo(f"{label}: {done} of {total}", err=True)

    def _draw(self, label: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        if self._bar is None:
            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        known = {task.description: task.id for task in self._bar.tasks}
        task = known[label] if label in known else self._bar.add_task(label, total=total)
        self._bar.update(task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """Say something on stderr that is no result."""
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
        """Print the result, as JSON or as text; end with 3 where samples failed, or with the code of an error beside it."""
        self.close()
        for one in failed:
            self.note(f"failed: {one['path']} ({one['stage']}): {one['reason']}")
        if self.json:
            print_envelope(self.command, data=data, error=describe_error(error) if error else None)
        elif text:
            click.echo(text)
        if error:
            click.echo(f"error: {error}", err=True)
            raise Exit(error.exit_code)
        if failed:
            raise Exit(3)


def print_envelope(
    command: str, *, data: Mapping[str, Any] | None = None, error: Mapping[str, Any] | None = None
) -> None:
    """Print the one JSON object that ends stdout."""
    body = {name: value for name, value in (("error", error), ("data", data)) if value is not None}
    envelope = {"schema": 1, "command": command, "ok": not error, **body, "warnings": WARNINGS}
    click.echo(json.dumps(envelope))


def describe_error(error: EmbedpipeError) -> dict[str, str]:
    """Return what the envelope says of an error."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


class Verbs(click.RichGroup):
    """A group whose unknown commands name the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args and args[0] not in names:
            close = nearest(args[0], names) or names
            what = " ".join([*COMMAND, "command"])
            raise UsageError(f"no {what} {args[0]!r}", hint=f"did you mean {', '.join(close)}?")
        COMMAND.extend(args[:1])
        return super().resolve_command(ctx, args)


class Typed(click.ParamType[Any]):
    """A click type that checks a value against an option's annotation."""

    name = "value"

    def __init__(self, option: Option) -> None:
        self.option = option

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if self.option.needs_no_value and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        return check_value(self.option, value)

    def get_metavar(self, param: Any, ctx: Any) -> str:
        return _metavar(self.option.annotation)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    parts = [a for a in get_args(annotation) if a not in (type(None), bool)] or [annotation]
    if parts == [annotation]:
        return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")
    return "|".join(sorted({_metavar(part) for part in parts}, key=str.isupper))


def click_option(option: Option) -> click.Option:
    """Turn one option of a deed into click's."""
    flag = "--" + option.name.replace("_", "-")
    if option.annotation is bool:
        declaration = f"{flag}/--no-{flag[2:]}" if option.default else flag
        return click.Option([declaration], is_flag=True, default=option.default, help=option.help, show_default=True)
    if is_multiple(option):
        return click.Option([flag], multiple=True, type=str, default=(), help=option.help)
    if option.needs_no_value:
        return click.Option(
            [flag], is_flag=False, flag_value="true", default="false", type=Typed(option), help=option.help
        )
    shown = option.default is not None
    return click.Option([flag], type=Typed(option), default=option.default, help=option.help, show_default=shown)


def is_multiple(option: Option) -> bool:
    kinds = (option.annotation, *get_args(option.annotation))
    return any(get_origin(kind) is tuple for kind in kinds)


def shared_options() -> list[click.Option]:
    """Return the options that stand before or after any command."""
    return [
        click.Option(["--cache-dir"], default="cache", show_default=True, help="Folder of the cache."),
        click.Option(["--runs-dir"], default="runs", show_default=True, help="Folder of the runs."),
        click.Option(
            ["--config"], is_eager=True, callback=_load_config, expose_value=False, help="YAML file of settings."
        ),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Seed of all that is random."),
        click.Option(["--json"], is_flag=True, help="Print one JSON object."),
        click.Option(["--quiet"], is_flag=True, help="Print results and errors only."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Show the warnings of libraries."),
    ]


def command(deed: Callable[..., Any] | None, *, example: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function (session, arguments, **options): the deed's options, the shared ones, its help."""

    def make(body: Callable[..., None]) -> click.Command:
        @functools.wraps(body)
        @click.pass_context
        def run(ctx: click.Context, /, **values: Any) -> None:
            _check_environment(ctx)
            shared = {name: _shared_value(ctx, name) for name in (*SHARED, *PRESENTATION)}
            for name in shared:
                values.pop(name, None)
            session = Session(" ".join(COMMAND), json=shared["json"], quiet=shared["quiet"])
            ctx.call_on_close(session.close)
            values |= {name: shared[name] for name in takes if name in shared}
            body(session, **values)

        options = options_of(deed) if deed else ()
        takes = {option.name for option in options}
        doc = (deed or body).__doc__ or ""
        summary = doc.strip().split("\n    Parameters")[0].strip()
        params = list(reversed(getattr(body, "__click_params__", [])))
        described = _describe(params, parameter_helps(doc))
        run.__click_params__ = []  # type: ignore[attr-defined]
        return click.RichCommand(
            name=body.__name__.replace("_", "-"),
            callback=run,
            help=f"{summary}{described}\n\nExample: `{example}`",
            params=[*params, *(click_option(o) for o in options if o.name not in SHARED), *shared_options()],
        )

    return make


def _describe(params: list[click.Parameter], helps: Mapping[str, str]) -> str:
    lines = [
        f"{p.human_readable_name}: {helps[p.name]}" for p in params if isinstance(p, click.Argument) and p.name in helps
    ]
    return "".join(f"\n\n{line}" for line in lines)


def _shared_value(ctx: click.Context, name: str) -> Any:
    """Return a shared option's value: flag over environment over config over default, after the command over before."""
    ranks = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
    chain = [c for c in _line_of(ctx) if name in c.params]
    for rank in ranks:
        for context in chain:
            if context.get_parameter_source(name) is rank:
                return context.params[name]
    return chain[0].params[name]


def _check_environment(ctx: click.Context) -> None:
    """Refuse a variable of this command that is no option of it.

    Raises
    ------
    UsageError    with the nearest one
    """
    prefix = f"{ctx.auto_envvar_prefix}_"
    known = [f"{prefix}{(param.name or '').upper()}" for param in ctx.command.params]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known:
            close = nearest(name, known)
            hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise UsageError(f"unknown variable {name} in the environment", hint=hint)


def _line_of(ctx: click.Context | None) -> list[click.Context]:
    """Return a context and those above it, the nearest first."""
    return [ctx, *_line_of(ctx.parent)] if ctx else []


def _leaves(ctx: click.Context, group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Return the commands of a group by what a user types: `extract`, `cache ls`."""
    found: dict[str, click.Command] = {}
    for name in group.list_commands(ctx):
        one = group.get_command(ctx, name)
        if isinstance(one, click.Group):
            found |= _leaves(ctx, one, f"{prefix}{name} ")
        elif one is not None:
            found[f"{prefix}{name}"] = one
    return found


def _load_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Put a YAML file's settings under the flags and the environment."""
    if not value:
        return
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    options = {
        name: {p.name: p for p in one.params if isinstance(p, click.Option)}
        for name, one in _leaves(root, root.command).items()
    }
    settings = read_config(Path(value), {name: tuple(o) for name, o in options.items()})
    shared = {key: value for key, value in settings.items() if key not in options}
    tree = dict(shared)
    for name in options.keys() & settings.keys():
        section = settings[name]
        for key, setting in section.items():
            if options[name][key].multiple and isinstance(setting, str):
                section[key] = [setting]
            elif isinstance(setting, list) and not options[name][key].multiple:
                raise UsageError(f"--config {value}: {key} under {name} is a list, expected one value")
        *groups, leaf = name.split()
        functools.reduce(lambda level, group: level.setdefault(group, {}), groups, tree)[leaf] = section
    for context in reversed(_line_of(ctx)[:-1]):
        tree = {**shared, **tree.get(context.info_name or "", {})}
    ctx.default_map = tree


SHOWN = {  # the score that has an interval in the table, what it is called, and two more
    "accuracy": ("accuracy", "macro F1", "log loss"),
    "mean_average_precision": ("mean AP", "macro F1", "log loss"),
    "r2": ("R2", "MAE", "RMSE"),
}


def _number(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.4f}"


def scores(metrics: Mapping[str, Mapping[str, Any]], chosen_on: str | None = None) -> str:
    """Return a table of scores, a row a split; the one that helped to choose the head is marked."""
    main = next((name for one in metrics.values() for name in SHOWN if name in one), "accuracy")
    title, *others = SHOWN[main]
    words = "".join(f" {word:>9}" for word in others)
    lines = [f"{'split':<6} {'n':>6} {title:>9}  {'95 % interval':<16}{words}"]
    for split, one in metrics.items():
        interval = one[f"{main}_ci95"] and "{:.4f} - {:.4f}".format(*one[f"{main}_ci95"])
        name = f"{split}*" if split == chosen_on else split
        values = "".join(f" {_number(one[word.lower().replace(' ', '_')])}" for word in others)
        lines.append(f"{name:<6} {one['n']:>6} {_number(one[main])}  {interval or '-':<16}{values}")
    if chosen_on in metrics:
        lines.append(f"* {chosen_on} was used to make this head: only other images say what it does on new ones")
    return "\n".join(lines)


def worst(found: Mapping[str, Any] | None) -> str:
    """Return the table of the worst classes, or nothing where a report names none."""
    if not found:
        return ""
    width = max(len("worst classes"), *(len(one["class"]) for one in found["classes"]))
    lines = [f"\n{'worst classes':<{width}} {'n':>6} {'precision':>9} {'recall':>7}  {'95 % interval':<16} {'F1':>7}"]
    for one in found["classes"]:
        low, high = one["recall_ci95"]
        precision = "-" if one["precision"] is None else f"{one['precision']:.4f}"
        lines.append(
            f"{one['class']:<{width}} {one['n']:>6} {precision:>9} {one['recall']:>7.4f}  "
            f"{f'{low:.4f} - {high:.4f}':<16} {one['f1']:>7.4f}"
        )
    return "\n".join(lines)

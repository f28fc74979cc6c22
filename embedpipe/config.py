"""From a deed's signature to options, and from YAML, environment and flags back to keyword arguments.

For doors only. A deed's keyword-only parameters are its options: name, default and type stand in the signature, the help
text in the docstring, and nowhere else. Nothing here imports a deed or torch.

>>> [option.name for option in options_of(extraction.extract)][:2]
['weights', 'layer']
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from embedpipe.errors import UsageError
from embedpipe.provenance import nearest

SHARED = ("cache_dir", "runs_dir", "seed")
NOT_OPTIONS = ("progress", "schedule")
MAX_BYTES = 1 << 20  # of a YAML file
MAX_SHOWN = 120  # characters of a value in a message


@dataclass(frozen=True)
class Option:
    """One option: the parameter's name, its type, its default, and one line of help."""

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def needs_no_value(self) -> bool:
        """Whether it may stand alone, as in `--resume`, or before a value, as in `--resume RUN`."""
        return bool in get_args(self.annotation)


def options_of(deed: Callable[..., Any]) -> tuple[Option, ...]:
    """Return the options that a deed's keyword-only parameters make, in their order."""
    parameters = inspect.signature(deed).parameters.values()
    helps = parameter_helps(deed.__doc__ or "")
    module = vars(sys.modules[deed.__module__])
    return tuple(
        Option(p.name, eval(p.annotation, module), p.default, helps.get(p.name, ""))
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in NOT_OPTIONS
    )


def parameter_helps(docstring: str) -> dict[str, str]:
    """Return the indented text below each `name : type` line of a numpydoc docstring, on one line."""
    helps: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*) : [^\n]*\n((?: {8}[^\n]*\n?)+)", docstring, re.MULTILINE):
        helps |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
    return helps


def check_value(option: Option, value: Any) -> Any:
    """Return `value` as the option's type.

    Raises
    ------
    UsageError    another type or range
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(option.annotation).validate_python(value)
    except ValidationError as exc:
        wanted = "; or ".join(dict.fromkeys(error["msg"][:1].lower() + error["msg"][1:] for error in exc.errors()))
        flag = "--" + option.name.replace("_", "-")
        raise UsageError(f"{flag}: found {_shown(value)}; {wanted}", option=option.name, value=value) from None


def read_config(path: Path, commands: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return a YAML file's settings: shared options at the top, a section for each command.

    Parameters
    ----------
    path : Path
        The file.
    commands : mapping of str to tuple of str
        Names of the options that each command takes.

    Returns
    -------
    dict
        As click's `default_map` wants it: `{option: text, command: {option: text or list of texts}}`.

    Raises
    ------
    UsageError    no such file, no plain YAML, or a key that nobody knows
    """
    settings = _read_yaml(path)
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: expected keys and values, found {type(settings).__name__}")
    flat = {key: value for key, value in settings.items() if key not in commands}
    _check_keys(path, flat, SHARED, extra=tuple(commands))
    flat = _texts(path, {key.replace("-", "_"): value for key, value in flat.items()})
    sections = {}
    for command, section in settings.items():
        if command in commands:
            if not isinstance(section, dict):
                raise UsageError(f"--config {path}: {command} expected keys and values, found {_shown(section)}")
            section = {str(key).replace("-", "_"): value for key, value in section.items()}
            _check_keys(path, section, (*commands[command], *SHARED), where=f" under {command}")
            sections[command] = _texts(path, section, where=f" under {command}", lists=True)
    return {**flat, **sections}


def read_schedule(path: Path, deed: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return the phases in a YAML file: a list of keys and values, those that are options of the deed as its types.

    Raises
    ------
    UsageError    no such file, no plain YAML, no list of keys and values, or a value of another type
    """
    phases, options = _read_yaml(path, "--schedule"), {option.name: option for option in options_of(deed)}
    if not (isinstance(phases, list) and phases and all(isinstance(phase, dict) for phase in phases)):
        raise UsageError(
            f"--schedule {path}: expected a list of phases", hint="such as `- {unfreeze: layer4, epochs: 5}`"
        )

    def typed(key: str, value: Any) -> Any:
        text = [str(one) for one in value] if isinstance(value, list) else str(value)
        return check_value(options[key], text) if key in options else value

    named = [{str(key).replace("-", "_"): value for key, value in phase.items()} for phase in phases]
    return [{key: typed(key, value) for key, value in phase.items() if value is not None} for phase in named]


def _read_yaml(path: Path, flag: str = "--config") -> Any:
    """Read plain values: no tags of Python, and no aliases, which make a small file a huge value."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.get_mark()
                raise yaml.MarkedYAMLError(problem="found an alias (*), expected values written out", problem_mark=mark)
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names: set[str] = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in names:
                    problem = f"found {key.value} twice, expected it once"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                names.add(str(key.value))
            return node

    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        return yaml.load(raw.decode("utf-8"), Loader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        reason = _shortened(" ".join(str(exc).split()), 400)
        raise UsageError(f"{flag} {path}: {reason}", hint="name a YAML file, for example configs/digits.yaml") from exc


def _shown(value: Any) -> str:
    return _shortened(repr(value), MAX_SHOWN)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _texts(path: Path, found: Mapping[str, Any], *, where: str = "", lists: bool = False) -> dict[str, Any]:
    """Return settings as the texts that flags would carry, so that both are read alike; a key without a value sets nothing."""

    def text(key: str, value: Any) -> str:
        if isinstance(value, str | int | float):
            return str(value)
        raise UsageError(f"--config {path}: {key}{where} is {_shown(value)}, expected a text or a number")

    return {
        key: [text(key, one) for one in value] if lists and isinstance(value, list) else text(key, value)
        for key, value in found.items()
        if value is not None
    }


def _check_keys(
    path: Path, found: Mapping[str, Any], known: tuple[str, ...], *, where: str = "", extra: tuple[str, ...] = ()
) -> None:
    for key in found:
        if str(key).replace("-", "_") not in known:
            close = nearest(str(key), [*known, *extra])
            hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join((*known, *extra))}"
            raise UsageError(f"--config {path}: unknown key {_shown(key)}{where}", hint=hint)

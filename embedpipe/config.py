"""Options of the command line: from a function's signature to options, and from YAML values to keyword arguments.

The keyword-only parameters of a command function are its options. Their names, types and defaults stand in the signature,
their help texts in the docstring, and nowhere else. This module imports neither commands nor torch.

>>> [option.name for option in options_of(extraction.extract)][:2]
['weights', 'layer']
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from embedpipe.errors import UsageError
from embedpipe.provenance import nearest

SHARED = ("cache_dir", "runs_dir", "seed")  # options of all commands, also valid at the top of a YAML file
NOT_OPTIONS = ("progress", "schedule")
MAX_BYTES = 1 << 20  # of a YAML file


@dataclass(frozen=True)
class Option:
    """An option: the name, type and default of a parameter, and one line of help."""

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def has_optional_value(self) -> bool:
        """True if the option may stand without a value, as `--resume` or as `--resume RUN`."""
        return bool in get_args(self.annotation)


def options_of(function: Callable[..., Any]) -> tuple[Option, ...]:
    """Return the options of a command function, in the order of its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    helps = parameter_helps(function.__doc__ or "")
    module = vars(sys.modules[function.__module__])
    return tuple(
        Option(p.name, eval(p.annotation, module), p.default, helps.get(p.name, ""))
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in NOT_OPTIONS
    )


def parameter_helps(docstring: str) -> dict[str, str]:
    """Return the description of each parameter in a numpydoc docstring, on one line."""
    helps: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*) : [^\n]*\n((?: {8}[^\n]*\n?)+)", docstring, re.MULTILINE):
        helps |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
    return helps


def check_value(option: Option, value: Any) -> Any:
    """Return `value` converted to the type of an option.

    Raises
    ------
    UsageError    the value has another type, or is out of range
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(option.annotation).validate_python(value)
    except ValidationError as exc:
        expected = "; or ".join(dict.fromkeys(error["msg"][:1].lower() + error["msg"][1:] for error in exc.errors()))
        flag = "--" + option.name.replace("_", "-")
        message = f"{flag}: found {_shorten(repr(value))}; {expected}"
        raise UsageError(message, option=option.name, value=value) from None


def read_config(
    path: Path, commands: Mapping[str, Mapping[str, bool]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the settings in a YAML file: shared options at the top, and a section for each command.

    ::

        cache-dir: /data/cache
        fit-head:
          solver: newton

    Parameters
    ----------
    path : Path
        The file.
    commands : mapping of str to mapping of str to bool
        For each command the names of its options, and whether they are repeatable.

    Returns
    -------
    shared : dict
        The shared options, with their values as texts.
    sections : dict of dict
        The options of each command, with texts, or lists of texts if they are repeatable.

    Raises
    ------
    UsageError    the file does not exist, is not plain YAML, or has an unknown key or a value that is not text or a number
    """
    settings = _read_yaml(path)
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: expected keys and values, found {type(settings).__name__}")
    shared = dict.fromkeys(SHARED, False)
    sections = {command: settings.pop(command) for command in commands if command in settings}
    for command, section in sections.items():
        if not isinstance(section, dict):
            raise UsageError(f"--config {path}: {command} expected keys and values, found {_shorten(repr(section))}")
        sections[command] = _texts(path, section, {**commands[command], **shared}, where=f" under {command}")
    return _texts(path, settings, shared, others=commands), sections


def _texts(
    path: Path, settings: Mapping[Any, Any], known: Mapping[str, bool], *, where: str = "", others: Iterable[str] = ()
) -> dict[str, Any]:
    """Return settings as the texts that flags would have, so that both are converted alike; those without a value are left out.

    known : mapping of str to bool    names of options, and whether they are repeatable
    others : iterable of str          other names to suggest for an unknown one
    """
    texts: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = suggest(str(key), [*known, *others])
            raise UsageError(f"--config {path}: unknown key {_shorten(repr(key))}{where}", hint=hint)
        values = value if isinstance(value, list) and known[name] else [value]
        if value is None:
            continue
        if not all(isinstance(item, str | int | float) for item in values):
            raise UsageError(f"--config {path}: {key}{where} is {_shorten(repr(value))}, expected text or a number")
        texts[name] = [str(item) for item in values] if known[name] else str(value)
    return texts


def read_schedule(path: Path, function: Callable[..., Any]) -> list[dict[str, Any]]:
    """Read the phases in a YAML file, a list of mappings; options of the command function get their types.

    Raises
    ------
    UsageError    the file does not exist, is not plain YAML or not such a list, or a value has another type
    """
    phases, options = _read_yaml(path, "--schedule"), {option.name: option for option in options_of(function)}
    if not (isinstance(phases, list) and phases and all(isinstance(phase, dict) for phase in phases)):
        hint = "such as `- {unfreeze: layer4, epochs: 5}`"
        raise UsageError(f"--schedule {path}: expected a list of phases", hint=hint)

    def typed(key: str, value: Any) -> Any:
        text = [str(item) for item in value] if isinstance(value, list) else str(value)
        return check_value(options[key], text) if key in options else value

    named = [{str(key).replace("-", "_"): value for key, value in phase.items()} for phase in phases]
    return [{key: typed(key, value) for key, value in phase.items() if value is not None} for phase in named]


def _read_yaml(path: Path, flag: str = "--config") -> Any:
    """Read plain YAML: without Python tags, without aliases (which make a small file a huge value), and no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.get_mark()
                raise yaml.MarkedYAMLError(problem="found an alias (*), expected values written out", problem_mark=mark)
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in keys:
                    problem = f"found {key.value} twice, expected it once"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(str(key.value))
            return node

    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        return yaml.load(raw.decode("utf-8"), Loader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        reason = " ".join(str(exc).split())
        hint = "give a YAML file, for example configs/digits.yaml"
        raise UsageError(f"{flag} {path}: {_shorten(reason, 400)}", hint=hint) from exc


def suggest(name: str, known: Sequence[str]) -> str:
    """Return the hint for an unknown name: the known names that are spelled most like it, or all of them."""
    close = nearest(name, known)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"


def _shorten(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."

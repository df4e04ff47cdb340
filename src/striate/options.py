"""The options of a verb, read off its function: parameters, and the fields of the option dataclasses among them.

The command line and the sections of a sweep file are both made of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import docstring_parser
from jsonargparse import Namespace

# The command line always shows progress; the library only when asked.
ALWAYS = {"progress": True}


@dataclass(frozen=True)
class Option:
    """One thing that can be set. `default` is `inspect.Parameter.empty` where it has to be."""

    name: str
    hint: Any
    default: Any
    description: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def several(self) -> bool:
        """Whether it takes more than one word: `--data a.json b.json`."""
        return "Sequence" in str(self.hint)

    @property
    def switch(self) -> bool:
        """Whether naming it is enough: `--resume`, also where it can take a word, `--resume auto`."""
        return self.hint is bool or bool in get_args(self.hint)

    @property
    def flag(self) -> str:
        """Its spelling on the command line: `--save-steps`."""
        return flag(self.name)


def options_of(function: Callable[..., Any]) -> Iterator[Option]:
    """Everything that can be set about a verb, in the order of its signature."""
    hints = get_type_hints(function)
    described = _descriptions(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ALWAYS:
            continue
        if not _holds_options(hints[name]):
            yield Option(_spelt(name), hints[name], parameter.default, described.get(name, ""))
            continue
        kind, preset = hints[name], parameter.default
        field_hints, field_texts = get_type_hints(kind), _descriptions(kind)
        for field in fields(kind):
            text = field_texts.get(field.name, "")
            yield Option(field.name, field_hints[field.name], getattr(preset, field.name), text)


def call_arguments(function: Callable[..., Any], values: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    """Values by option name as the function wants them, option dataclasses put together again."""
    hints = get_type_hints(function)
    call: dict[str, Any] = {}
    for name in inspect.signature(function).parameters:
        if name in ALWAYS:
            call[name] = ALWAYS[name]
        elif _holds_options(hints[name]):
            call[name] = hints[name](**{field.name: values[field.name] for field in fields(hints[name])})
        else:
            call[name] = values[_spelt(name)]
    return call


def flag(name: str) -> str:
    """An option's spelling on the command line."""
    return "--" + name.replace("_", "-")


def _spelt(name: str) -> str:
    """A parameter's name without the underscore that keeps it apart from a word of Python: `import_`."""
    return name.rstrip("_")


def _holds_options(hint: Any) -> bool:
    return is_dataclass(hint) and isinstance(hint, type)


def _descriptions(thing: Any) -> dict[str, str]:
    parsed = docstring_parser.parse_from_object(thing)
    return {item.arg_name: (item.description or "").replace("\n", " ").strip() for item in parsed.params}

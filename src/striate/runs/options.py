"""The options of a verb: the parameters of its function, and the fields of the option dataclasses among them.

`Annotated[TrainOptions, Only("steps batch")]`: of these fields two are options, the others keep their defaults.

The command line and the sections of a sweep file are built from these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import Namespace

from striate.errors import flag

# The command line always shows progress, the library only on request.
ALWAYS = {"progress": True}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "a mapping",
}


@dataclass(frozen=True)
class Only:
    """The fields of an option dataclass, separated by spaces, that a verb has as options."""

    names: str


@dataclass(frozen=True)
class Option:
    """One option. `default` is `inspect.Parameter.empty` where a value is required."""

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
        """Whether the flag alone is enough: `--resume`, even if it also accepts a word, `--resume auto`."""
        return self.hint is bool or bool in get_args(self.hint)

    @property
    def flag(self) -> str:
        """The option on the command line: `--save-steps`."""
        return flag(self.name)


def options_of(function: Callable[..., Any]) -> Iterator[Option]:
    """All options of a verb, in the order of its signature."""
    hints = get_type_hints(function, include_extras=True)
    described = _descriptions(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ALWAYS:
            continue
        if not (names := _fields(hints[name])):
            yield Option(_option_name(name), hints[name], parameter.default, described.get(name, ""))
            continue
        kind = type(parameter.default)
        field_hints, field_texts = get_type_hints(kind), _descriptions(kind)
        for field in names:
            yield Option(field, field_hints[field], getattr(parameter.default, field), field_texts.get(field, ""))


def call_arguments(function: Callable[..., Any], values: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    """The arguments of the function, option dataclasses included, from values by option name."""
    hints = get_type_hints(function, include_extras=True)
    call: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ALWAYS:
            call[name] = ALWAYS[name]
        elif names := _fields(hints[name]):
            call[name] = replace(parameter.default, **{field: values[field] for field in names})
        else:
            call[name] = values[_option_name(name)]
    return call


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a verb as options by name: the fields of an option dataclass in its place."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found |= vars(value) if is_dataclass(value) else {name: value}
    return found


def kind_of(hint: Any) -> str:
    """A description of the values of this type."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(kind_of(one) for one in get_args(hint) if one is not NoneType)
    return KINDS.get(get_origin(hint) or hint, str(hint))


def _option_name(name: str) -> str:
    """A parameter's name without the underscore after a Python keyword: `import_`."""
    return name.rstrip("_")


def _fields(hint: Any) -> list[str]:
    """The fields of an option dataclass that are options; none for any other type."""
    kind, only = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    if not (is_dataclass(kind) and isinstance(kind, type)):
        return []
    return only.names.split() if only else [field.name for field in fields(kind)]


def _descriptions(thing: Any) -> dict[str, str]:
    """The description of each parameter or field, inherited ones included."""
    found: dict[str, str] = {}
    for one in reversed(thing.__mro__[:-1]) if isinstance(thing, type) else [thing]:
        for item in docstring_parser.parse_from_object(one).params:
            found[item.arg_name] = (item.description or "").replace("\n", " ").strip()
    return found
